"""The report in headless Chromium: no error, filters that return the right rows, texts that stay text."""

from __future__ import annotations

import numpy as np
import pytest
from browsers import open_chromium
from pages import HOSTILE, make_evaluation

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with open_chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def opened(driver, tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluation") / "hostile"
    predictions = make_evaluation(directory, 120)
    driver.get((directory / "report.html").as_uri())
    return predictions


@pytest.fixture
def page(driver, opened):
    driver.refresh()
    return driver


def choose(page, **values):
    """Set filters as a person does, and wait for the rows."""
    from selenium.webdriver.support.ui import Select

    for name, value in values.items():
        element = page.find_element("id", name)
        if element.tag_name == "select":
            Select(element).select_by_visible_text(value)
        else:
            element.clear()
            element.send_keys(str(value))
    page.execute_async_script("setTimeout(arguments[0], 250)")


def shown(page) -> list[int]:
    """Return the numbers of all rows that pass the filters, page after page."""
    rows: list[int] = []
    while True:
        rows += [int(a.get_attribute("data-row")) for a in page.find_elements("css selector", "#list article")]
        following = page.find_element("id", "next")
        if not following.is_enabled():
            return rows
        following.click()


def check_quiet(page):
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert page.execute_script("return window.hacked") is None


def test_nothing_runs_and_nothing_is_logged(page):
    assert len(shown(page)) == 120
    assert page.find_elements("css selector", "article script, article img, article svg, article b b") == []
    page.find_element("id", "reveal").click()
    check_quiet(page)
    title = page.find_element("tag name", "h1").text
    assert "<script>window.hacked=9</script>" in title


def test_filters_return_the_right_rows(page, opened):
    truth, flagged = opened.flagged_vote == 1, opened.judgement.flagged
    for name, expected in (
        ("false positive", flagged & ~truth),
        ("false negative", ~flagged & truth),
        ("true positive", flagged & truth),
        ("true negative", ~flagged & ~truth),
        ("wrong", flagged != truth),
    ):
        choose(page, reference="labels", outcome=name)
        assert sorted(shown(page)) == np.flatnonzero(expected).tolist(), name
    human = opened.verdicts["<i>human</i>"]
    choose(page, reference="<i>human</i>", outcome="false negative")
    assert sorted(shown(page)) == np.flatnonzero(~flagged & (human == 1)).tolist()
    choose(page, outcome="any", model="two & three")
    assert sorted(shown(page)) == [i for i in range(120) if i % 3 == 1]
    choose(page, model="any", reference="labels", category="privacy_violation", outcome="false positive")
    said, true = opened.judgement.categories[:, 9], opened.votes[:, 9] == 1
    assert sorted(shown(page)) == np.flatnonzero(said & ~true).tolist()
    choose(page, outcome="any", low="0.30", high="0.60")
    risk = np.round(opened.judgement.probabilities[:, 9], 4)
    assert sorted(shown(page)) == np.flatnonzero((risk >= 0.3) & (risk <= 0.6)).tolist()
    check_quiet(page)


def test_search_and_order(page, opened):
    choose(page, search="ONERROR", order="highest probability first")
    found = shown(page)
    rows = [i for i in range(120) if "onerror" in (opened.prompts[i] + opened.responses[i]).lower()]
    assert sorted(found) == rows and found
    risks = np.round(opened.judgement.risk, 4)[found]
    assert (np.diff(risks) <= 0).all()
    choose(page, search="nobody says this")
    assert shown(page) == [] and page.find_element("id", "count").text == "no row"
    check_quiet(page)


def test_texts_are_blurred_until_asked_for(page, opened):
    choose(page, order="as in the file")
    first = page.find_element("css selector", "#list article")
    veil = first.find_elements("css selector", ".veil")[1]
    assert "blur" in veil.value_of_css_property("filter")
    assert veil.get_attribute("textContent") == opened.responses[0] == HOSTILE[0]
    button = first.find_element("tag name", "button")
    button.click()
    assert veil.value_of_css_property("filter") == "none" and button.get_attribute("aria-expanded") == "true"
    others = page.find_elements("css selector", "#list article .veil")[2:]
    assert all("blur" in other.value_of_css_property("filter") for other in others)
    page.find_element("id", "reveal").click()
    veils = page.find_elements("css selector", "#list .veil")
    assert all(each.value_of_css_property("filter") == "none" for each in veils)


def test_tables_sort_by_a_click_and_empty_cells_stay_last(page):
    table = page.find_elements("css selector", "table")[0]
    head = table.find_elements("css selector", "th")[3]
    head.find_element("tag name", "button").click()

    def column():
        cells = [row.find_elements("tag name", "td")[3] for row in table.find_elements("css selector", "tbody tr")]
        return [float(cell.get_attribute("data-value")) for cell in cells if cell.get_attribute("data-value")]

    assert head.get_attribute("aria-sort") == "descending" and column() == sorted(column(), reverse=True)
    head.find_element("tag name", "button").click()
    assert head.get_attribute("aria-sort") == "ascending" and column() == sorted(column())


def test_a_phone_needs_no_sideways_scrolling(page):
    page.set_window_size(500, 900)
    try:
        wide, there = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= there
    finally:
        page.set_window_size(1280, 900)


def test_a_whole_test_split_can_be_browsed(driver, tmp_path):
    """33,396 rows, as BeaverTails' 330k_test has."""
    predictions = make_evaluation(tmp_path / "large", 33_396, replicates=0, hostile=False)
    driver.get((tmp_path / "large" / "report.html").as_uri())
    assert driver.find_element("id", "count").text == "1 to 20 of 33396 rows"
    choose(driver, reference="labels", outcome="false negative")
    missed = int((~predictions.judgement.flagged & (predictions.flagged_vote == 1)).sum())
    assert driver.find_element("id", "count").text.endswith(f"of {missed} rows")
    choose(driver, outcome="any", search="number 42")
    assert driver.find_element("id", "count").text.startswith("1 to 20 of ")
    check_quiet(driver)
