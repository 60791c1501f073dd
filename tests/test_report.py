"""The report without a browser: from saved files alone, complete, and with texts that stay text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from pages import HOSTILE, make_evaluation

from qlora_moderation.errors import CheckpointError
from qlora_moderation.rendering import Paragraph, Table, format_value, render_markdown, render_page
from qlora_moderation.report import REPORT_FILES, write_report


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluation") / "hostile"
    make_evaluation(directory, 60)
    return directory


class Page(HTMLParser):
    """Collects the tags of a page, and what stands in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def test_no_text_becomes_markup(evaluation):
    text = (evaluation / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 2 and "hacked" not in page.scripts[1]
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"b onmouseover", "svg", "plaintext", "iframe", "u", "i", "link", "object"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#")), attributes
    rows = json.loads(page.scripts[0])["rows"]
    assert [row["r"] for row in rows] == [HOSTILE[(i * 5) % len(HOSTILE)] for i in range(60)]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_the_policy_allows_the_script_of_the_page_and_no_other(evaluation):
    import base64
    import hashlib

    text = (evaluation / "report.html").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(Page(text).scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "unsafe-inline" not in re.search(r"script-src ([^;\"]*)", text)[1]


def test_a_report_is_made_anew_without_torch(evaluation):
    before = {name: (evaluation / name).read_bytes() for name in REPORT_FILES}
    for name in REPORT_FILES:
        (evaluation / name).unlink()
    code = (
        "import sys\nfrom qlora_moderation.cli import run_job\n"
        f"code = run_job('report', ['--evaluation_dir', {str(evaluation)!r}])\n"
        "assert 'transformers' not in sys.modules, 'a figure needs no model'\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (evaluation / "report.html").read_bytes() == before["report.html"]
    assert {name for name in before if (evaluation / name).is_file()} == set(before)


@pytest.mark.parametrize("name", ["predictions.jsonl", "metrics.json"])
def test_a_report_needs_the_files_of_an_evaluation(name, evaluation, tmp_path):
    import shutil

    shutil.copytree(evaluation, tmp_path / "e")
    (tmp_path / "e" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        write_report(tmp_path / "e")


@pytest.mark.parametrize(
    "damage",
    [
        lambda result: {},
        lambda result: {**result, "data": {}},
        lambda result: {**result, "flagged_proportion": []},
        lambda result: {
            **result,
            "settings": {"thresholds": {"flagged": {"threshold": 1}, "categories": {}, "fit": {}}},
        },
    ],
)
def test_a_damaged_metrics_file_is_named(damage, evaluation, tmp_path, capsys):
    import shutil

    from qlora_moderation.cli import run_job

    shutil.copytree(evaluation, tmp_path / "e")
    file = tmp_path / "e" / "metrics.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    assert run_job("report", ["--evaluation_dir", str(tmp_path / "e")]) == 2
    assert "metrics.json: lacks or garbles" in capsys.readouterr().err


def test_values_are_told_with_their_intervals():
    assert format_value((0.5, [0.25, 0.75])) == "0.500 (0.250 to 0.750)"
    assert format_value((None, [0.1, 0.2])) == format_value(None) == "" and format_value((0.5, None)) == "0.500"
    assert format_value(1234) == "1,234" and format_value("a") == "a"
    assert "|  | v/w |\n|---|---|\n| x/y&lt;i&gt; | 1.000 |" in render_markdown(
        "t", [Table(["", "v|w"], [["x|y<i>", 1.0]])]
    )


def test_slots_of_the_page_are_filled_once(tmp_path):
    rows = {"rows": [{"p": "@@SCRIPT@@"}], "categories": [], "models": [], "references": []}
    page = render_page("@@DATA@@", [Paragraph("@@BODY@@")], rows, tmp_path)
    assert page.count("@@SCRIPT@@") == 1 and page.count("<p>@@BODY@@</p>") == 1 and "<h1>@@DATA@@</h1>" in page
