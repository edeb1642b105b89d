# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: keyboard navigation, phone, dark mode and print."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from minbert_fast.reporting.comparison import write_comparison
from minbert_fast.reporting.report import write_report
from minbert_fast.reporting.search_page import write_search
from tests.browser import Page, browser, chromium
from tests.reporting.test_report import make_run
from tests.reporting.test_search import trial, write_trials

pytestmark = [pytest.mark.ci, pytest.mark.skipif(chromium() is None, reason="no Chromium")]
PAGES = ("report", "comparison", "search")
A4 = 718  # CSS pixels between the margins


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / "a-run-with-a-rather-long-name-of-its-own"), make_run(folder / "second", lr=2e-3)]
    trials = [trial(0.5 + 0.1 * i, lr=f"{i + 1}e-4", method=("none", "pcgrad")[i % 2]) for i in range(4)]
    return {
        "report": write_report(runs[0]),
        "comparison": write_comparison(runs, folder / "comparison.html"),
        "search": write_search(write_trials(folder / "search", [*trials, trial(None, lr="1", method="none")])),
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


#: All visible elements that react to a pointer or scroll.
STOPS = """[...document.querySelectorAll('a[href], summary, button, input, [tabindex], .scroll')]
  .filter(e => !e.closest('details:not([open]) > :not(summary)'))"""

#: Index of the focused element in STOPS, whether its outline is visible, and whether the element is in view.
FOCUS = f"""(() => {{
  const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
  return [{STOPS}.indexOf(e), style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2,
    box.bottom > 0 && box.top < innerHeight && box.right > 0];
}})()"""


@pytest.mark.parametrize("name", PAGES)
def test_the_tab_key_reaches_every_stop_with_a_visible_outline(tab: Page, pages: dict[str, Path], name: str) -> None:
    tab.size(1280)
    tab.media()
    tab.open(pages[name])
    count = tab.evaluate(f"{STOPS}.length")
    assert count > 4
    seen = []
    for _ in range(count):
        tab.press("Tab")
        place, outlined, in_sight = tab.evaluate(FOCUS)
        seen.append(place)
        assert outlined, place
        assert in_sight, place
    assert seen == list(range(count)), "each once, in the order of the page"


def test_collapsible_parts_open_and_close_by_key(tab: Page, pages: dict[str, Path]) -> None:
    tab.open(pages["report"])
    folds = tab.evaluate("document.querySelectorAll('details').length")
    assert folds >= 2
    for fold in range(folds):
        tab.evaluate(f"document.querySelectorAll('summary')[{fold}].focus()")
        for key, expected in (("Enter", True), (" ", False)):
            tab.press(key)
            assert tab.evaluate(f"document.querySelectorAll('details')[{fold}].open") is expected


#: Elements that overflow the window, except inside scrollable boxes.
OUTSIDE = """(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll > *') && !e.matches('.skip')
    && (e.getBoundingClientRect().right > width + 1 || e.getBoundingClientRect().left < -1))
    .map(e => e.tagName + '.' + e.className);
})()"""

#: The smallest font size on the page in CSS pixels, with the scaling of charts.
SMALLEST = """Math.min(...[...document.querySelectorAll('text, p, td, th, li, a, figcaption, summary, pre, span')].map(e => {
  const svg = e.closest('svg'), scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  return parseFloat(getComputedStyle(e).fontSize) * scale; }))"""


@pytest.mark.parametrize("name", PAGES)
def test_no_element_overflows_and_text_stays_readable(tab: Page, pages: dict[str, Path], name: str) -> None:
    tab.media()
    for width in (320, 400, 800, 1200):
        tab.size(width)
        tab.open(pages[name])
        assert tab.evaluate(OUTSIDE) == [], width
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(SMALLEST) >= (9 if width >= 400 else 7.5), width


#: Text that is cut off: of tables that would have to scroll, and of charts beyond their edges.
CUT = """(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const wide = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1);
  const beyond = [...document.querySelectorAll('svg text')].filter(e => {
    const box = e.getBoundingClientRect(), chart = e.closest('svg').getBoundingClientRect();
    return box.left < chart.left - 1 || box.right > chart.right + 1; });
  return [...wide.map(e => e.getAttribute('aria-label')), ...beyond.map(e => e.textContent)];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1200])
def test_the_report_is_read_whole_at_every_width(tab: Page, pages: dict[str, Path], width: int, scheme: str) -> None:
    """The verdicts come first, the next steps after them, and nothing is cut off."""
    tab.media(scheme)
    tab.size(width)
    tab.open(pages["report"])
    text = " ".join(tab.evaluate("document.body.innerText").split())
    order = (
        "Overall score", "0.654", "0.500 before training", "Sentiment: accuracy", "0.914", "± 0.0", "standard error",
        "0.464 for always answering “bad”", "Better than before training and always answering “bad”.", "What next?",
        "The last evaluation was the best one: train longer.", "--epochs 2 --output", "Other scores", "Curves",
        "Train against dev", "Loss: sentiment", "training", "dev", "Sentiment", "Confusion matrix", "By class",
        "41 0.76 1.00", "Labels and predictions", "Calibration", "expected error 0.084", "Worst errors", "Similarity",
        "Predicted against true", "mean by label", "Gradient conflicts", "Environment",
    )  # fmt: skip
    place = 0
    for part in order:
        assert part in text[place:], part
        place += text[place:].index(part)
    assert tab.evaluate(CUT) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


#: The lowest contrast (WCAG 2) between a text and its background, and that text.
CONTRAST = """(() => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = e => e ? over(parse(getComputedStyle(e).backgroundColor), under(e.parentElement)) : [255, 255, 255, 1];
  let worst = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.matches('.skip')) continue;
    const style = getComputedStyle(e), back = under(e);
    const front = over(parse(e.closest('svg') ? style.fill : style.color), back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.tagName + ' ' + e.textContent.trim().slice(0, 40)];
  }
  return worst;
})()"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_suffices_in_light_and_dark_mode(tab: Page, pages: dict[str, Path], name: str, scheme: str) -> None:
    tab.size(1280)
    tab.media(scheme)
    tab.open(pages[name])
    ratio, text = tab.evaluate(CONTRAST)
    assert ratio >= 4.5, text
    brightness = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(brightness) < 60) == (scheme == "dark")


@pytest.mark.parametrize("name", PAGES)
def test_the_printed_page_is_white_complete_and_unfolded(tab: Page, pages: dict[str, Path], name: str) -> None:
    """Printing ignores dark mode, opens collapsible parts and cuts nothing off."""
    tab.size(A4)
    tab.media("dark", "print")
    tab.open(pages[name])
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    assert tab.evaluate(CONTRAST)[0] >= 4.5
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert tab.evaluate(cut) == 0
    hidden = "[...document.querySelectorAll('details > :not(summary)')].filter(e => !e.checkVisibility()).length"
    assert tab.evaluate(hidden) == 0
    paper = tab.pdf()
    assert paper.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", paper + _streams(paper))) >= (1 if name == "search" else 2)


def _streams(paper: bytes) -> bytes:
    """The decompressed streams of a PDF, which contain its objects."""
    found = []
    for part in re.findall(rb"stream\r?\n(.*?)endstream", paper, re.S):
        try:
            found.append(zlib.decompress(part))
        except zlib.error:
            continue
    return b"".join(found)
