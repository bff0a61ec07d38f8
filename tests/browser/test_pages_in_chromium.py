"""Dashboard and report of a finished and of a running search, looked at in Chromium."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser import missing
from tests.browser.conftest import Site

if TYPE_CHECKING:
    from PIL import Image
    from selenium.webdriver.remote.webelement import WebElement

    from tests.browser.chromium import Browser

CARDS = {
    "finished": ("steps", "bits", "sensitivity", "training"),
    "running": ("steps", "bits", "sensitivity"),  # and trains nothing
}
BLANK_HTML = "data:text/html,<div id=card style='width:600px;height:450px'>No data</div>"
WAIT_S = 120


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    missing.skip()
    from tests.browser.chromium import Browser

    with Browser(1500, 1000) as browser:
        yield browser


def looks_drawn(picture: Image.Image) -> bool:
    """Return whether a figure is there: ink, and colour, where axes and texts are grey."""
    from tests.browser.chromium import drawn_share, n_hues

    return drawn_share(picture) > 0.02 and n_hues(picture) >= 1


def wait_until_drawn(browser: Browser, element: WebElement, what: str | None) -> None:
    browser.wait(lambda: looks_drawn(browser.picture(element)), WAIT_S, f"picture of {what}")


def cards(browser: Browser) -> dict[str, WebElement]:
    return {
        (element.get_attribute("id") or "").removeprefix("user-defined-plot:"): element
        for element in browser.find("[id^='user-defined-plot:']")
        if element.find_elements("css selector", ".main-svg")
    }


def wait_for_cards(browser: Browser, site: Site) -> dict[str, WebElement]:
    browser.open(site.url)
    wanted = set(CARDS[site.folder.name])
    browser.wait(lambda: set(cards(browser)) == wanted, WAIT_S, "figures")
    return cards(browser)


def detail(site: Site) -> dict:
    study_id = site.url.rpartition("/")[2]
    with urllib.request.urlopen(f"{site.base}/api/studies/{study_id}") as answer:
        return json.loads(answer.read())


def test_a_blank_figure_is_told_from_a_drawn_one(browser):
    browser.open(BLANK_HTML)
    assert not looks_drawn(browser.picture(browser.find("#card")[0]))


@pytest.mark.parametrize("state", ["finished", "running"])
def test_the_study_page_shows_the_figures_and_no_errors(browser, state, request):
    from tests.browser.chromium import drawn_share

    site = request.getfixturevalue(state)
    for name, card in wait_for_cards(browser, site).items():
        wait_until_drawn(browser, card, name)
    (history,) = browser.find("#plot-history")
    browser.wait(lambda: len(browser.find("#plot-history .point")) >= 3, WAIT_S, "history")
    assert drawn_share(browser.picture(history)) > 0.005  # a few points, grey where over budget
    # No figure lies over the next one: cards are as high as what is in them.
    for name, card in cards(browser).items():
        (svg, *_) = card.find_elements("css selector", ".main-svg")
        assert svg.size["height"] <= card.size["height"] + 1, name
        assert svg.size["width"] <= card.size["width"] + 1, name
    browser.wait(lambda: "Best Trial (number=" in browser.text(), WAIT_S, "best trial")
    assert browser.console_errors() == []


def test_the_best_trial_is_the_answer_and_is_within_budget(browser, finished):
    wait_for_cards(browser, finished)
    answer = max(t["number"] for t in detail(finished)["trials"] if _kind(t) == "incumbent")
    browser.wait(lambda: "Best Trial (number=" in browser.text(), WAIT_S, "best trial")
    assert f"Best Trial (number={answer})" in browser.text()


def _kind(trial) -> str:
    return next(a["value"] for a in trial["user_attrs"] if a["key"] == "kind")


@pytest.mark.parametrize(
    ("state", "says"),
    [("finished", "Finished: the budget is met"), ("running", "State. Running. ")],
)
def test_the_note_is_current_and_its_links_lead_somewhere(browser, state, says, request):
    site = request.getfixturevalue(state)
    browser.open(f"{site.url}/note")
    browser.wait(lambda: "Latest steps" in browser.text(), WAIT_S, "note")
    assert says in browser.text()
    assert browser.find("table")  # Markdown, not its source
    links = [link.get_attribute("href") for link in browser.find("table a, p a")]
    assert any("/trials?numbers=" in link for link in links)
    files = [link for link in links if "/artifacts/" in link]
    assert len(files) == (4 if state == "finished" else 2)  # sensitivities from the start
    for link in files:
        with urllib.request.urlopen(link) as answer:
            assert answer.status == 200
            assert answer.read()
    assert browser.console_errors() == []


def test_a_link_in_the_note_leads_to_a_trial_that_says_what_it_was(browser, finished):
    browser.open(f"{finished.url}/note")
    browser.wait(lambda: browser.find("a[href*='numbers=']"), WAIT_S, "links")
    browser.find("a[href*='numbers=']")[0].click()
    browser.wait(lambda: "Closes step" in browser.text(), WAIT_S, "the trial's note")
    browser.open(f"{finished.url}/trials?numbers=2")
    browser.wait(lambda: "Step 1, candidate " in browser.text(), WAIT_S, "a candidate's note")
    assert browser.console_errors() == []


def test_the_importances_are_those_of_the_layers(browser, finished):
    wait_for_cards(browser, finished)
    (card,) = browser.wait(
        lambda: browser.find("#graph-hyperparameter-importances"), WAIT_S, "importances"
    )
    wait_until_drawn(browser, card, "importances")


def test_the_files_of_the_study_are_on_its_page(browser, finished):
    wait_for_cards(browser, finished)
    text = browser.text()
    for name in ("report.html", "assignment.json", "sensitivity.csv", "sensitivity.json"):
        assert text.count(name) == 1, name


def test_the_report_opens_from_the_note_with_its_figures(browser, finished):
    browser.open(f"{finished.url}/note")
    browser.wait(lambda: browser.find("a[href*='/artifacts/']"), WAIT_S, "links")
    (link,) = [a for a in browser.find("a[href*='/artifacts/']") if a.text == "report"]
    link.click()
    look_at_report(browser, trains=True)


def test_the_report_of_a_running_search_is_drawn(browser, running, tmp_path):
    from hq_optuna.report.page import write_report
    from hq_optuna.storages import load_study, sqlite_url

    study = load_study(sqlite_url(running.folder / "study.db"), "running")
    write_report(study, tmp_path / "report.html")
    browser.open((tmp_path / "report.html").as_uri())
    look_at_report(browser)


def look_at_report(browser: Browser, *, trains: bool = False) -> None:
    def figures() -> dict[str | None, WebElement]:
        found = [f for f in browser.find("figure .js-plotly-plot") if f.size["height"] > 0]
        return {figure.get_attribute("id"): figure for figure in found}

    def complete() -> bool:
        ids = figures().keys()
        return len(ids) >= 4 and (not trains or "fig-training" in ids)

    browser.wait(complete, WAIT_S, "figures of the report")
    for name, figure in figures().items():
        wait_until_drawn(browser, figure, name)
    for link in browser.find("a[href^='#']"):
        assert browser.find(f"[id='{(link.get_attribute('href') or '').partition('#')[2]}']")
    assert browser.console_errors() == []
