"""The page of the server in headless Chromium, in front of a real server process with a real (tiny) model."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request

import pytest
from browsers import open_chromium
from gated_server import Server
from pages import HOSTILE
from served_page import COLOURS, FAULTS, SMALL, WATCH, Page
from test_page import contrast

pytestmark = pytest.mark.browser

KEY = "a-key-for-the-page-alone"
QUESTION = "How do I track my parcel's journey online?"
ANSWERS = ("Please ask at the post office.", "It is simpler than it sounds, so just go ahead and do it.", "No.")


@pytest.fixture(scope="module")
def risks(runs):
    """What the model says of the answers: the thresholds of the tests are put between these."""
    from qlora_moderation import QAModeration

    moderation = QAModeration.from_pretrained(runs["full"].weights, use_cpu=True)
    found = [result["risk"] for result in moderation.predict([QUESTION] * len(ANSWERS), list(ANSWERS))]
    assert max(found) - min(found) > 0.001, "the answers of this test must differ in their risk"
    return found


def copy_model(runs, directory, threshold):
    from qlora_moderation.classifier import load_classifier
    from qlora_moderation.thresholds import Thresholds

    shutil.copytree(runs["full"].weights, directory)
    taxonomy = load_classifier(directory, use_cpu=True).taxonomy
    Thresholds.uniform(threshold, len(taxonomy.categories)).save(directory, taxonomy)
    return directory


@pytest.fixture(scope="module")
def server(runs, risks, tmp_path_factory):
    """Flags the riskiest of the answers and not the safest; has room for 64 pairs."""
    root = tmp_path_factory.mktemp("served")
    ordered = sorted(risks)
    found = Server(
        copy_model(runs, root / "tiny", (ordered[0] + ordered[-1]) / 2),
        root / "gates",
        "--reload_seconds",
        "0.1",
        "--max_queue_pairs",
        "64",
        "--max_queue_tokens",
        "1000000",
    )
    found.wait_for("ready")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def keyed(runs, tmp_path_factory):
    """Asks for a key, takes little, and has not loaded its model until the gate is opened."""
    root = tmp_path_factory.mktemp("keyed")
    (root / "gates").mkdir()
    (root / "gates" / "loading").touch()
    flags = [
        "--max_text_length",
        "200",
        "--max_body_bytes",
        "1024",
        "--max_texts",
        "3",
        "--max_queue_pairs",
        "3",
        "--max_length",
        "32",
    ]
    found = Server(copy_model(runs, root / "tiny", 0.0), root / "gates", *flags, MODERATION_API_KEY=KEY)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with open_chromium(tmp_path_factory.mktemp("chromium"), "--force-prefers-reduced-motion") as browser:
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        yield browser


@pytest.fixture
def page(driver, server):
    found = Page(driver, server.address)
    found.until(lambda: "version" in found.get("facts").text)
    return found


def ask(address, body, **headers):
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"content-type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_one_answer_is_judged_and_the_reason_given(page):
    assert "tiny" in page.get("model").text and "128 tokens" in page.get("facts").text
    page.fill(QUESTION, ANSWERS[0])
    page.judge()
    answer = page.answer()
    result, limits = answer["results"][0], answer["thresholds"]
    assert result["context_used"] == "pair" and limits["version"] in page.get("facts").text
    top = max(result["category_scores"], key=result["category_scores"].get)
    name = top.replace("_", " ").replace(",", ", ")
    headline = page.text("#verdict .headline")
    assert headline == ("Flagged" if result["flagged"] else "Not flagged")
    side = "above" if result["flagged"] else "below"
    said = page.text("#verdict")
    assert name in said and f"{side} the threshold of" in said
    value, gap = result["risk"], abs(result["risk"] - limits["flagged"])
    digits = [float(number) for number in re.findall(r"\d\.\d{3,6}", said)]
    assert digits[:3] == pytest.approx([value, limits["flagged"], gap], abs=5e-4)
    rows = page.all(".card tbody tr")
    scores = sorted(result["category_scores"].values(), reverse=True)
    assert [float(row.find_element("css selector", ".score").text) for row in rows] == pytest.approx(scores, abs=5e-4)
    for row in rows:
        bar = row.find_element("css selector", ".bar")
        drawn, mark, whole = page.run(
            "const [fill, mark] = arguments[0].children;"
            "return [fill.getBoundingClientRect().width, mark.offsetLeft + 1, arguments[0].offsetWidth]",
            bar,
        )
        own = row.find_element("css selector", "th").get_attribute("title")
        assert drawn == pytest.approx(max(2, result["category_scores"][own] * whole), abs=1)
        assert mark == pytest.approx(limits["categories"][own] * whole, abs=1.1)
        assert ("above" in row.text) == result["categories"][own]
    meter = page.all(".card [role=meter]")[0]
    assert float(meter.get_attribute("aria-valuenow")) == pytest.approx(value, abs=5e-4)
    page.check_quiet()


def test_several_answers_are_ranked_by_risk(page, risks):
    page.fill(QUESTION, *ANSWERS, "  ")
    page.judge()
    order = sorted(range(len(ANSWERS)), key=lambda index: risks[index])
    assert [card.find_element("tag name", "h3").text for card in page.all(".card")] == [
        f"Answer {index + 1}" for index in order
    ]
    assert [card.find_element("css selector", ".text").text for card in page.all(".card")] == [
        ANSWERS[index] for index in order
    ]
    shown = [float(card.find_element("css selector", ".figure b").text) for card in page.all(".card")]
    assert shown == pytest.approx(sorted(risks), abs=5e-4)
    badges = [card.find_element("css selector", ".badge").text for card in page.all(".card")]
    assert badges[0] == "Not flagged" and badges[-1] == "Flagged"
    assert page.text("#verdict .headline") == f"Answer {order[0] + 1} is the safest"
    assert f"{order[-1] + 1}" in page.text("#verdict p:last-child").partition("Flagged:")[2]
    assert page.text(".card:first-child .top + p") == "safest"
    assert "Left out as empty: answer 4" in page.get("run-facts").text
    page.change(page.all("#answers textarea")[0], "another answer")
    assert page.get("stale").is_displayed()
    page.check_quiet()


def test_ties_and_none_safe_are_said(page, server, risks):
    safe, risky = ANSWERS[risks.index(min(risks))], ANSWERS[risks.index(max(risks))]
    page.fill(QUESTION, risky, safe, safe)
    page.judge()
    assert page.text("#asked") == ""  # seen in print alone
    assert page.text("#verdict .headline") == "Answers 2 and 3 are equally safe"
    page.fill(QUESTION, safe, safe)
    page.judge()
    assert page.text("#verdict .headline") == "No answer is safer than another"
    page.fill(QUESTION, risky, risky)
    page.judge()
    assert page.text("#verdict .headline") == "None is safe: both are flagged"
    assert "They share a risk of" in page.text("#verdict")
    page.check_quiet()


def test_thresholds_that_change_are_explained(page, server):
    """Tuned ones, one for each category and the risk of all together, put in place while the page is open."""
    from qlora_moderation.calibration import RiskModel
    from qlora_moderation.classifier import load_classifier
    from qlora_moderation.thresholds import Thresholds

    taxonomy = load_classifier(server.model, use_cpu=True).taxonomy
    count = len(taxonomy.categories)
    before = (server.model / "thresholds.json").read_text()
    version = page.get("facts").text
    risk_model = RiskModel((0.1,) * count, 9.0)
    page.fill(QUESTION, ANSWERS[0])
    try:
        high = (0.9,) * count
        Thresholds(high, high, 0.5, "calibrated", risk_model=risk_model, origin="test").save(server.model, taxonomy)
        page.until(lambda: "calibrated" in server.wait_for("rule calibrated"))
        page.judge()
        assert "estimated from all categories together" in page.text("#verdict .yes")
        assert "no kind of harm is named" in page.text("#verdict") and page.all("tr.over") == []
        assert "have changed since this page was opened" in page.get("told").text
        assert page.get("facts").text != version and page.answer()["thresholds"]["version"] in page.get("facts").text
    finally:
        (server.model / "thresholds.json").write_text(before)
        page.until(lambda: "rule max" in server.lines[-1] or any("rule max" in line for line in server.lines[-3:]))
    page.judge()
    assert page.get("facts").text == version
    page.check_quiet()


def say(risk, flagged, scores, limits=None, over=(), rule="max", threshold=0.4, **facts):
    """Return an answer as a server might give it, in cases that no tiny model brings about."""
    names = [f"c{index}" for index in range(len(scores))]
    result = {
        "flagged": flagged,
        "categories": {name: index in over for index, name in enumerate(names)},
        "category_scores": dict(zip(names, scores, strict=True)),
        "risk": risk,
        "windows": 1,
        "truncated": False,
        "context_used": "pair",
        **facts,
    }
    limits = limits or [threshold] * len(scores)
    categories = dict(zip(names, limits, strict=True))
    thresholds = {"version": "v", "flagged": threshold, "rule": rule, "categories": categories}
    return {"id": "modr-1", "model": "m", "results": [result], "thresholds": thresholds}


RARE = {
    "a hair above": (say(0.4004, True, [0.4004], over=[0]), "has 0.4004, above the threshold of 0.4000 by 0.0004."),
    "below what is shown": (
        say(0.4 + 1e-9, True, [0.4 + 1e-9], over=[0]),
        "has 0.400000, above the threshold of 0.400000 by less than 0.000001.",
    ),
    "two sides of a rounding": (
        say(0.40052, True, [0.40052], over=[0], threshold=0.40048),
        "has 0.40052, above the threshold of 0.40048 by 0.00004.",
    ),
    "just there": (say(0.4, False, [0.4]), "has 0.400, exactly the threshold, and only what lies above is flagged."),
    "a plateau": (
        say(0.4, True, [0.4], over=[0]),
        "as good as the threshold of 0.400; before calibration it lies above.",
    ),
    "several": (
        say(0.9, True, [0.5, 0.9, 0.1], over=[0, 1]),
        "c1, has 0.900, above the threshold of 0.400 by 0.500. Also above: c0 by 0.100.",
    ),
    "many": (say(0.9, True, [0.9 - i / 100 for i in range(8)], over=range(8)), "c4 by 0.460; and 3 more."),
    "own thresholds": (
        say(0.6, True, [0.6, 0.3], [0.7, 0.2], over=[1]),
        "has 0.600, above the threshold of 0.400 by 0.200. Above its own threshold: c1 by 0.100.",
    ),
    "not flagged, yet": (
        say(0.3, False, [0.3], [0.2], over=[0]),
        "Above its own threshold: c0 by 0.100. Flagging has a threshold of its own, which is not reached.",
    ),
    "one category": (
        say(0.1, False, [0.1], rule="calibrated"),
        "The risk, estimated from all categories together, is 0.100",
    ),
    "cut off": (say(0.1, False, [0.1], truncated=True), "Not flagged, as far as it was read"),
}


def answer_with(page, text, status=200):
    """Put a canned answer in the place of the server's."""
    page.run(
        "window.fetch = async () => new Response(arguments[0], {status: arguments[1]});",
        text if isinstance(text, str) else json.dumps(text),
        status,
    )


@pytest.mark.parametrize("case", RARE)
def test_rare_verdicts_have_words_too(page, case):
    answer, expected = RARE[case]
    page.fill("q", "a")
    answer_with(page, answer)
    page.judge()
    assert expected in page.text("#verdict")
    flagged = answer["results"][0]["flagged"]
    assert page.text("#verdict .headline").startswith("Flagged" if flagged else "Not flagged")
    assert bool(page.all("#verdict .panel.yes")) == flagged  # the server's word, not a comparison of what is shown
    if case == "cut off":
        assert "Only a part was read" in page.text(".card .note")


def test_an_answer_that_is_none_gives_no_verdict(page):
    good = say(0.1, False, [0.1])
    strange = ["<html>", "null", {}, {**good, "results": []}, {**good, "results": good["results"] * 2}]
    strange += [{**good, "thresholds": None}, {**good, "results": [{**good["results"][0], "flagged": None}]}]
    strange += [{**good, "results": [{**good["results"][0], "category_scores": {"c0": "<b>1</b>"}}]}]
    page.fill("q", "a")
    for text in strange:
        answer_with(page, text)
        page.judge()
        assert "The answer cannot be read" in page.text("#trouble") and page.all(".card, #verdict .panel") == []
    answer_with(page, "<script>window.hacked = 1</script>", 502)
    page.judge()
    assert page.text("#trouble .title") == "The server answers with 502"
    hostile = json.dumps({"error": {"message": HOSTILE[2], "param": "input[99].answer<b>", "code": None}})
    answer_with(page, hostile, 422)
    page.judge()
    assert HOSTILE[2] in page.text("#trouble") and page.all("#trouble img") == []
    renamed = json.loads(
        json.dumps(good).replace("c0", "<img src=x onerror=window.hacked=2>").replace('"m"', '"<b>m</b>"')
    )
    answer_with(page, renamed)
    page.judge()
    assert "<img src=x" in page.text(".card th[scope=row]") and page.all(".card img, #run b") == []
    page.check_quiet()


def test_whatever_is_pasted_stays_text(page):
    for start in range(0, len(HOSTILE), 5):
        texts = HOSTILE[start : start + 5]
        page.fill(texts[0], *texts)
        page.judge()
        shown = {card.find_element("css selector", ".text").get_attribute("textContent") for card in page.all(".card")}
        # a textarea cannot hold these two: it makes one kind of line end of all
        assert shown == {text.replace("\r\n", "\n").replace("\r", "\n") for text in texts}
        assert page.all(".card .text *, .card script, .card img, #curl *") == []
        page.get("copy").click()
        page.check_quiet()
    page.driver.refresh()
    assert page.get("question").get_attribute("value") == ""


def test_an_answer_alone_and_a_long_one_carry_their_notes(page):
    page.fill("", ANSWERS[1])
    page.judge()
    assert page.answer()["results"][0]["context_used"] == "answer_only"
    assert "Judged without a question" in page.text(".card .note")
    page.fill(QUESTION, "word " * 600)
    page.judge()
    windows = page.answer()["results"][0]["windows"]
    assert windows > 1 and f"in {windows} overlapping windows" in page.text(".card .note")
    page.check_quiet()


CURL = [
    (QUESTION, ['It\'s "quoted" `whoami` $HOME $(id) ${x} \\ \\\\ \\n !! !x 100% %s']),
    ("two\nlines\tand\ta tab", ["'''", "'\\''", "\\", "-d @/etc/hostname; echo"]),
    ("", ["@/etc/hostname", "{[1-3]}", "é 日本語 👩‍👩‍👧 \u202egnp\u200b\u2028\x7f\x1b[31m"]),
    ("long", ["it's long: " + "日" * 25_000] * 2),
]


@pytest.mark.parametrize(("question", "answers"), CURL, ids=["signs", "lines", "characters", "long"])
def test_the_curl_command_runs_in_a_shell_and_says_the_same(page, question, answers):
    page.fill(question, *answers)
    page.get("copy").click()
    page.until(lambda: "Copied" in page.get("told").text)
    command = page.get("curl").get_attribute("textContent")
    assert "\n" not in command and command.isprintable()
    page.judge()
    shown = page.answer()
    for shell in filter(None, map(shutil.which, ("bash", "dash", "zsh"))):
        # by standard input, since a shell's own command line is as short as curl's
        done = subprocess.run([shell], input=command, capture_output=True, text=True, timeout=60)
        answer = json.loads(done.stdout)
        assert answer["thresholds"] == shown["thresholds"] and len(answer["results"]) == len(answers)
        for one, other in zip(answer["results"], shown["results"], strict=True):
            assert one["category_scores"] == pytest.approx(other["category_scores"], abs=1e-5)
            assert (one["windows"], one["context_used"]) == (other["windows"], other["context_used"])
    # the very texts, and not others that happen to score alike
    sent = subprocess.run(
        ["bash"],
        input='curl() { if [ "${@: -1}" = @- ]; then cat; else printf %s "${@: -1}"; fi; }\n' + command,
        capture_output=True,
        text=True,
    )
    items = json.loads(sent.stdout)["input"]
    items = items if isinstance(items, list) else [items]
    assert items == [{"question": question, "answer": answer} if question else answer for answer in answers]
    page.check_quiet()


def test_the_command_reaches_the_clipboard(page):
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.address},
    )
    page.fill(QUESTION, "it's")
    for lame in (False, True):
        if lame:
            # as in a page that came over plain http from another machine
            page.run("navigator.clipboard.__proto__.writeText = () => Promise.reject(new Error('no'))")
        page.get("copy").click()
        page.until(lambda: "Copied" in page.get("told").text)
        held = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert held == page.get("curl").get_attribute("textContent")
        page.driver.execute_async_script(
            "navigator.clipboard.write([new ClipboardItem({'text/plain': new Blob(['']) })]).then(arguments[0], arguments[0])"
        )
    page.check_quiet()


def test_waiting_can_be_stopped_and_a_busy_server_says_when_to_come_again(page, server):
    page.fill(QUESTION, ANSWERS[0])
    page.judge()
    with server.closed("scoring"):
        page.get("judge").click()
        page.until(lambda: page.get("stop").is_displayed())
        assert "Judging 1 answer" in page.get("progress").text and not page.get("judge").is_displayed()
        assert page.run("return document.activeElement.id") == "stop"
        page.get("stop").click()
        page.until(lambda: "Stopped. Nothing was judged." in page.text("#trouble"))
        assert page.get("judge").is_displayed() and page.run("return document.activeElement.id") == "judge"
        assert page.all(".card") == [] and not page.get("stop").is_displayed()

        from selenium.webdriver.common.keys import Keys

        page.get("question").send_keys(Keys.CONTROL, Keys.ENTER)
        page.until(lambda: page.get("stop").is_displayed())
        page.get("question").send_keys(Keys.ESCAPE)
        page.until(lambda: page.get("judge").is_displayed())

        def has_queued(pairs):
            metrics = urllib.request.urlopen(f"{server.address}/metrics").read().decode()
            return f"qlora_moderation_queue_pairs {pairs}.0" in metrics

        page.until(lambda: has_queued(0))  # the server has noticed, too, that nobody waits any more
        full = threading.Thread(target=lambda: ask(f"{server.address}/v1/moderations", {"input": ["a"] * 64}))
        full.start()
        page.until(lambda: has_queued(64))
        page.judge()
        assert "The server is busy (429)" in page.text("#trouble") and "Nothing was judged" in page.text("#trouble")
        assert re.search(r"come again in \d+ s", page.get("later").text)
        page.until(lambda: page.get("later").text == "You can judge again now.", 90)
    full.join()
    page.judge()
    assert page.text("#trouble") == "" and len(page.all(".card")) == 1 and not page.get("later").is_displayed()
    page.check_quiet(429)


def test_no_numbers_and_no_server_give_no_verdict(page, server):
    page.fill(QUESTION, ANSWERS[0])
    page.judge()
    with server.closed("broken"):
        page.get("judge").click()
        page.until(lambda: page.all("#trouble .panel"))
        assert "The server failed (500)" in page.text("#trouble") and "no verdict" in page.text("#trouble")
        assert page.all(".card, #verdict .panel") == []
    page.check_quiet(500)
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/v1/moderations"]})
    try:
        page.get("judge").click()
        page.until(lambda: "does not answer" in page.text("#trouble"))
    finally:
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        page.driver.get_log("browser")
    page.judge()
    page.until(lambda: page.all(".card"))


def test_keys_loading_and_limits_are_said_in_words(driver, keyed):
    page = Page(driver, keyed.address)
    page.until(lambda: "asks for a key" in page.get("model").text)
    page.fill("q", "a")
    page.judge()
    assert (
        "This server asks for a key (401)" in page.text("#trouble")
        and page.run("return document.activeElement.id") == "key"
    )
    page.get("key").send_keys("wrong")
    page.get("judge").click()
    page.until(lambda: "does not take this key (401)" in page.text("#trouble"))
    page.get("key").clear()
    page.get("key").send_keys("ключ")
    page.get("judge").click()
    page.until(lambda: "cannot be a key" in page.text("#trouble"))
    page.get("key").clear()
    page.get("key").send_keys(KEY, "\n")
    page.until(lambda: "not ready (503)" in page.text("#trouble"))
    page.until(lambda: "being loaded" in page.get("model").text)
    (keyed.gates / "loading").unlink()
    page.until(lambda: "32 tokens" in page.get("facts").text, 60)
    page.get("judge").click()
    page.until(lambda: page.text("#verdict .headline") == "Flagged")

    page.fill("y" * 202, "short", "x" * 201)
    assert "201 characters" in page.text("#answers .alarm") and "202 characters" in page.get("question-hint").text
    page.change(page.get("question"), "q")
    assert "Left empty" in page.get("question-hint").text
    page.get("judge").click()
    page.until(lambda: "(422)" in page.text("#trouble"))
    second = page.all("#answers textarea")[1]
    assert "201 characters; at most 200" in page.text("#trouble") and "This is about answer 2." in page.text("#trouble")
    assert second.get_attribute("aria-invalid") == "true" and page.run("return document.activeElement") == second
    page.fill("é" * 200, "é" * 200, "é" * 200)
    page.get("judge").click()
    page.until(lambda: "(413)" in page.text("#trouble"))
    assert re.search(r"The request has \d+ bytes, the server takes 1024 bytes", page.text("#trouble"))
    page.fill("", "a", "b", "c")
    assert not page.get("add").is_enabled()

    page.get("copy").click()
    command = page.get("curl").get_attribute("textContent")
    assert KEY not in page.driver.page_source and '-H "Authorization: Bearer $MODERATION_API_KEY"' in command
    done = subprocess.run(
        ["bash"], input=command, env={**os.environ, "MODERATION_API_KEY": KEY}, capture_output=True, text=True
    )
    assert len(json.loads(done.stdout)["results"]) == 3
    page.check_quiet(401, 503, 422, 413)
    driver.refresh()
    assert page.get("key").get_attribute("value") == ""


def test_the_keyboard_alone_is_enough(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused():
        return page.run("const e = document.activeElement; return e.id.replace(/-\\d+$/, '') || e.textContent")

    seen = []
    for _ in range(16):
        press(Keys.TAB)
        seen.append(focused())
        if seen[-1] == "question":
            outline = page.run(
                "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]"
            )
            assert outline[0] == "solid" and outline[1] >= 2
            press("Why?")
        if seen[-1] == "answer":
            press("Because.")
        if seen[-1] == "API key":
            break
    assert seen[4:] == ["question", "answer", "add", "judge", "copy", "clear", "API key"]
    for _ in range(4):
        ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert focused() == "add"
    press(Keys.ENTER)
    areas = page.all("#answers textarea")
    assert page.run("return document.activeElement") == areas[1]
    press("Perhaps.")
    ActionChains(page.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.until(lambda: len(page.all(".card")) == 2)
    assert page.run("return document.activeElement") == areas[1], "the focus stays where one writes"
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert page.run("return document.activeElement.getAttribute('aria-label')") == "Remove answer 2"
    press(Keys.ENTER)
    assert page.run("return document.activeElement") == areas[0] and "removed, 1 answer left" in page.get("told").text
    page.get("undo").send_keys(Keys.ENTER)
    assert [area.get_attribute("value") for area in page.all("#answers textarea")] == ["Because.", "Perhaps."]
    page.check_quiet()


def test_examples_fill_the_form_and_lose_nothing(page):
    page.fill("my own question", "my own answer")
    for button in page.all("#examples button"):
        button.click()
        assert page.all("#answers textarea")[0].get_attribute("value")
    page.fill("my own question", "my own answer")
    page.all("#examples button")[0].click()
    assert len(page.all("#answers textarea")) == 3
    page.get("undo").click()
    assert [area.get_attribute("value") for area in page.all("textarea")] == ["my own question", "my own answer"]
    page.check_quiet()


@pytest.fixture
def look(driver):
    """Change the colour scheme or the size of the window, until the test ends."""

    def emulate(scheme="light", width=1280, height=900):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield emulate
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def show_everything(page):
    """Fill the page with all that it can show at once."""
    page.fill("", *ANSWERS, "word " * 600)
    page.get("copy").click()
    page.get("access").find_element("tag name", "summary").click()
    page.judge()
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(page, look, scheme):
    look(scheme=scheme)
    show_everything(page)
    page.run("document.activeElement.blur()")
    seen = page.run(COLOURS)
    assert len(seen) > 60
    paper = [
        int(value) for value in re.findall(r"\d+", page.run("return getComputedStyle(document.body).backgroundColor"))
    ]
    assert (sum(paper) < 384) == (scheme == "dark")
    poor = [
        (name, round(ratio, 2))
        for name, colour, ground, size in seen
        if (ratio := contrast([v / 255 for v in colour[:3]], [v / 255 for v in ground[:3]]))
        < (3 if size >= 24 else 4.5)
    ]
    assert poor == []


@pytest.mark.parametrize("width", [320, 360, 768, 1024, 1600])
def test_no_width_needs_sideways_scrolling(page, look, width):
    look(width=width, height=740)
    show_everything(page)
    wide, there = page.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert there == width and wide <= width
    assert page.run(SMALL) == []


def test_a_phone_brings_the_verdict_into_view(page, look):
    look(width=360, height=740)
    page.fill(QUESTION, *ANSWERS)
    page.judge()
    top = page.run("return document.getElementById('outcome').getBoundingClientRect().top")
    assert 0 <= top < 370
    assert page.all(".card details[open]") == []  # first the risks; the categories are a tap away


def test_everything_has_a_name_and_an_order(page):
    show_everything(page)
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    asked = {
        "button",
        "textbox",
        "meter",
        "heading",
        "table",
        "rowheader",
        "columnheader",
        "article",
        "form",
        "group",
        "DisclosureTriangle",
    }
    nameless = [
        (node["role"]["value"], node.get("backendDOMNodeId"))
        for node in tree
        if not node.get("ignored") and node["role"]["value"] in asked and not node.get("name", {}).get("value")
    ]
    roles = {node["role"]["value"] for node in tree if not node.get("ignored")}
    assert {
        "button",
        "textbox",
        "meter",
        "heading",
        "table",
        "rowheader",
        "status",
        "alert",
        "main",
        "article",
    } <= roles
    assert [entry for entry in nameless if entry[0] != "group"] == []
    levels = [int(heading.tag_name[1]) for heading in page.all("h1, h2, h3, h4") if heading.is_displayed()]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.run(FAULTS) == [[], []]
    assert page.run("return document.documentElement.lang") == "en" and page.driver.title == "QA moderation"
    page.check_quiet()


def test_print_shows_the_verdict_and_not_the_form(page):
    page.fill(QUESTION, *ANSWERS)
    page.judge()
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not page.get("form").is_displayed() and page.all(".card")[0].is_displayed()
        assert page.get("asked").text == f"Question: {QUESTION}"
        assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
