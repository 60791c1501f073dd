"""The page of the server as a file: nothing from elsewhere, nothing that its policy would refuse, colours that can be read."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from qlora_moderation.serving.page import load_page

PAGE = files("qlora_moderation.serving").joinpath("page.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects tags with their attributes, and the text of style and script as a browser cuts it."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inline, self._open = [], {"style": [], "script": []}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._open = tag if tag in self.inline else None
        if self._open:
            self.inline[tag].append("")

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.inline[self._open][-1] += data


ELEMENTS = Elements(PAGE)
STYLE, SCRIPT = ELEMENTS.inline["style"][0], ELEMENTS.inline["script"][0]


def test_nothing_comes_from_elsewhere():
    for tag, attributes in ELEMENTS.found:
        for name in ("src", "srcset", "action", "formaction", "data", "poster", "background", "ping"):
            assert name not in attributes, tag
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), tag
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s'\"]*", PAGE)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # the name of a namespace, which is never fetched
    assert not re.search(r"@import|url\(", STYLE)


def test_nothing_inline_that_the_policy_refuses():
    for tag, attributes in ELEMENTS.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
    assert not re.search(r"cssText|setAttribute\(\"style|\.on\w+ = ", SCRIPT)


def test_texts_can_become_neither_markup_nor_code_nor_traces():
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment", SCRIPT
    )
    assert not re.search(r"\beval\b|new Function|set(Timeout|Interval)\(\s*[\"'`]", SCRIPT)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|\.cookie|history\.|caches\b|console\.", SCRIPT)
    assert not re.search(r"location\.(href|search|hash|assign|replace)|location =|window\.open|sendBeacon", SCRIPT)
    typed = [attributes for tag, attributes in ELEMENTS.found if tag in ("form", "textarea", "input")]
    assert typed and all(each.get("autocomplete") == "off" for each in typed)  # no browser keeps them for a later visit
    assert all(each.get("spellcheck") == "false" for each in typed[1:])  # some spelling services read along


def test_the_policy_names_the_hashes_that_browsers_compute():
    page, headers = load_page()
    assert page.decode() == PAGE and b"\r" not in page
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    for kind in ("style", "script"):
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in ELEMENTS.inline[kind]]
        assert policy[f"{kind}-src"] == " ".join(f"'sha256-{value}'" for value in hashes) and len(hashes) == 1
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"


def read_colours(block):
    return {
        name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for name, value in re.findall(r"--([\w-]+): #(\w{6})", block)
    }


def contrast(one, other):
    """Return the ratio of WCAG 2.2's definition of contrast."""

    def luminance(colour):
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


LIGHT, DARK = (read_colours(block) for block in re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)[:2])


@pytest.mark.parametrize("colours", [LIGHT, {**LIGHT, **DARK}], ids=["light", "dark"])
def test_colours_keep_the_contrast_of_wcag_aa(colours):
    texts = [(text, ground) for text in ("ink", "soft", "accent", "yes", "no", "warn") for ground in ("paper", "card")]
    texts += [(text, wash) for text in ("ink", "soft") for wash in ("yes-wash", "no-wash", "warn-wash")]
    texts += [("yes", "yes-wash"), ("no", "no-wash"), ("warn", "warn-wash"), ("on-accent", "accent"), ("paper", "ink")]
    shapes = [
        ("edge", "card"),
        ("edge", "paper"),
        ("bar", "track"),
        ("yes", "track"),
        ("ink", "track"),
        ("accent", "paper"),
    ]
    poor = [pair for pair in texts if contrast(colours[pair[0]], colours[pair[1]]) < 4.5]
    poor += [pair for pair in shapes if contrast(colours[pair[0]], colours[pair[1]]) < 3]
    assert not poor
