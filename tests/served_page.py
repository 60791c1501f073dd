"""A page in a browser as a person uses it, and what a careful eye sees of it."""

from __future__ import annotations

import json

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  violations.push(event.violatedDirective + " " + event.blockedURI);
});
"""
"""Run before the page: collects what its policy refuses."""

COLOURS = """
const found = [];
const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own && !element.matches("textarea, input") || element.closest("[disabled], script, style")) continue;
  if (!element.checkVisibility() || element.getBoundingClientRect().width < 2) continue;
  let ground = [0, 0, 0, 0];
  for (let at = element; at && ground[3] < 1; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour[3] > 0) ground = colour;
  }
  const style = getComputedStyle(element);
  const name = `${element.tagName}.${element.className} ${element.textContent.slice(0, 30)}`;
  found.push([name, parse(style.color), ground, parseFloat(style.fontSize)]);
}
return found;
"""
"""Returns name, colour, ground and size of every text in sight."""

SMALL = """
return [...document.querySelectorAll("button, summary, input, textarea")].filter((each) => each.checkVisibility())
  .map((each) => [each.id || each.textContent, each.getBoundingClientRect()])
  .filter(([, box]) => Math.min(box.width, box.height) < 24).map(([name, box]) => [name, box.width, box.height]);
"""
"""Returns what is too small to be hit with a finger (WCAG 2.2, 2.5.8)."""

FAULTS = """
const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
const named = ["aria-labelledby", "aria-describedby", "for"].flatMap((name) =>
  [...document.querySelectorAll(`[${name}]`)].flatMap((each) => each.getAttribute(name).split(" ")));
return [ids.filter((id, place) => ids.indexOf(id) !== place), named.filter((id) => !document.getElementById(id))];
"""
"""Returns ids that stand twice, and references to ids that are not there."""


class Page:
    """The page as a person uses it."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address
        driver.get(address + "/")
        driver.get_log("browser")

    def get(self, name):
        return self.driver.find_element("id", name)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, selector):
        return "\n".join(element.text for element in self.all(selector))

    def until(self, condition, seconds=30):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def fill(self, question, *answers):
        """Put texts in as pasting does: typing cannot make every character."""
        self.get("clear").click()
        for _ in answers[1:]:
            self.get("add").click()
        areas = [self.get("question"), *self.all("#answers textarea")]
        for area, text in zip(areas, (question, *answers), strict=True):
            self.change(area, text)

    def change(self, area, text):
        """Give a text area another text, as pasting over all of it does."""
        self.run(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            area,
            text,
        )

    def judge(self):
        """Press Judge and wait for whatever comes."""
        self.get("judge").click()
        self.until(lambda: self.all("#judge:not([hidden], [aria-disabled])"))

    def answer(self):
        """Return what the server said, as the page keeps it for developers."""
        return json.loads(self.get("json").get_attribute("textContent"))

    def check_quiet(self, *statuses):
        """Nothing was refused by the policy, fetched elsewhere, kept, or logged but the statuses that were meant to come."""
        assert self.run("return violations") == []
        assert self.run("return window.hacked") is None
        entries = self.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert {entry.removeprefix(self.address) for entry in entries} <= {"/v1/models", "/v1/moderations"}
        kept = self.run("return [localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert kept == [0, 0, "", self.address + "/"]
        log = [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        meant = [f"status of {status}" for status in statuses]
        assert [entry for entry in log if not any(status in entry["message"] for status in meant)] == []
