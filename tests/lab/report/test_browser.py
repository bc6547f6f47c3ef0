from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from muonscale.lab.report.page import Chart, ChartViews, Page
from muonscale.lab.report.runs import runs_page
from muonscale.lab.report.write import write_page
from tests.lab.report import browser as browsers
from tests.lab.report.browser import Browser
from tests.lab.report.folders import RESULT, heard, records, routed, telemetry, training, write_run
from tests.lab.report.sample import CHARTS, PAGE

pytestmark = pytest.mark.slow

STROKE = "getComputedStyle(document.querySelector('#figure-lr path.js-line')).stroke"
GROUND = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(68, 119, 170)", "rgb(119, 170, 221)"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(PAGE, tmp_path_factory.mktemp("report"))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as browser:
        yield browser


def figures_of(page: Page) -> int:
    return sum(isinstance(block, Chart | ChartViews) for block in page.blocks)


def assert_whole(browser: Browser, figures: int, path: Path) -> None:
    assert browser.problems == []
    assert browser.empty_figures() == []
    assert browser.evaluate("document.querySelectorAll('figure.chart').length") == figures
    assert {url for url in browser.requests if not url.startswith("data:")} == {
        path.resolve().as_uri()
    }


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_has_no_errors_and_all_figures(width: int, report: Path, browser: Browser) -> None:
    browser.open(report, width=width)
    assert_whole(browser, len(CHARTS), report)
    assert browser.evaluate("window.injected === undefined")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    widths = "[...document.querySelectorAll('.plot svg.main-svg')].map((e) => e.clientWidth)"
    assert all(0.4 * width < found <= width for found in browser.evaluate(widths))


def test_figures_follow_the_scheme(report: Path, browser: Browser) -> None:
    browser.open(report)
    assert (browser.evaluate(STROKE), browser.evaluate(GROUND)) == (LIGHT, "rgb(255, 255, 255)")
    browser.scheme(dark=True)
    browser.settle()
    assert (browser.evaluate(STROKE), browser.evaluate(GROUND)) == (DARK, "rgb(22, 24, 27)")
    ground = "getComputedStyle(document.querySelector('#figure-lr svg.main-svg')).backgroundColor"
    assert browser.evaluate(ground) == "rgb(22, 24, 27)"
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    browser.settle()
    assert browser.evaluate(STROKE) == LIGHT
    browser.open(report, dark=True)
    assert browser.evaluate(STROKE) == DARK
    assert_whole(browser, len(CHARTS), report)


def test_wide_tables_scroll_and_pages_do_not(browser: Browser, tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"a-run-with-a-long-name-{n}", records()) for n in range(5)]
    page = runs_page(paths)
    path = write_page(page, tmp_path / "report")
    browser.open(path, width=390)
    assert_whole(browser, figures_of(page), path)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    box = "document.querySelector('.scroll')"
    assert browser.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    assert browser.evaluate(f"{box}.classList.contains('wide')")


def test_a_page_of_a_run_with_everything(browser: Browser, tmp_path: Path) -> None:
    lines = [training(s) | routed(s) | heard(s) for s in range(1, 41)]
    page = runs_page([write_run(tmp_path / "run", [*lines, *map(telemetry, (10, 20, 30))])])
    path = write_page(page, tmp_path / "report")
    browser.open(path)
    assert_whole(browser, figures_of(page), path)


def test_the_axis_and_the_smoothing_of_losses_can_be_chosen(
    browser: Browser, tmp_path: Path
) -> None:
    page = runs_page([write_run(tmp_path / name, records()) for name in ("a", "b")])
    browser.open(write_page(page, tmp_path / "report"))
    figure = "document.querySelector('#figure-loss')"
    line = f"{figure}.querySelector('.plot').data.find((trace) => trace.meta)"
    assert browser.evaluate(f"{line}.x[39]") == 40 * 4096
    browser.evaluate(f"{figure}.querySelector('[data-view=loss-step]').click()")
    assert browser.evaluate(f"{line}.x[39]") == 40
    shown = f"[...{figure}.querySelectorAll('.of-view:not([hidden]) a')].map((a) => a.textContent)"
    assert browser.evaluate(shown) == ["PNG", "SVG", "CSV"]
    slider = f"{figure}.querySelector('input')"
    browser.evaluate(f"{slider}.value = 0; {slider}.dispatchEvent(new Event('input'))")
    assert browser.evaluate(f"{line}.y[1]") == 5.0  # the loss of step 2 itself
    assert browser.evaluate(f"{figure}.querySelector('output').textContent") == "none"
    assert browser.problems == []


def test_tables_are_sorted_by_a_click(browser: Browser, tmp_path: Path) -> None:
    losses = {"a": 3.5, "b": 10.0, "c": 3.25}
    paths = [
        write_run(tmp_path / name, records(), result=RESULT | {"validation_loss": loss})
        for name, loss in losses.items()
    ]
    browser.open(write_page(runs_page(paths), tmp_path / "report"))
    head = "document.querySelectorAll('th button')[2]"
    cells = "[...document.querySelector('tbody').rows].map((row) => row.cells[0].textContent)"
    for order in ("cab", "bac"):
        browser.evaluate(f"{head}.click()")
        assert browser.evaluate(cells) == list(order)


def test_commands_can_be_copied(report: Path, browser: Browser) -> None:
    browser.open(report)
    button = "document.querySelector('.command button')"
    assert browser.evaluate(f"{button}.hidden") is False
    browser.evaluate(f"{button}.click()")
    browser.settle()
    assert browser.evaluate(f"{button}.textContent") == "Copied"


def test_zooming_a_logarithmic_axis_brings_its_own_ticks(report: Path, browser: Browser) -> None:
    browser.open(report)
    plot = "document.querySelector('#figure-lr .plot')"
    mode = f"{plot}.layout.xaxis.tickmode"
    browser.evaluate(f"Plotly.relayout({plot}, {{'xaxis.range[0]': -2.1, 'xaxis.range[1]': -2}})")
    browser.settle()
    assert browser.evaluate(mode) == "auto"
    browser.evaluate(f"Plotly.relayout({plot}, {{'xaxis.autorange': true}})")
    browser.settle()
    assert browser.evaluate(mode) == "array"
    assert browser.problems == []


def test_without_scripts_there_are_pictures(report: Path, browser: Browser) -> None:
    browser.scripts(on=False)
    browser.open(report)
    widths = "[...document.querySelectorAll('noscript img')].map((image) => image.naturalWidth)"
    found = browser.evaluate(widths)
    assert len(found) == len(CHARTS) and all(width > 100 for width in found)


DAMAGE = {
    "plotly is left out": (get_plotlyjs(), ""),
    "a figure has no place": ('<div class="plot" role="img"', '<div role="img"'),
    "a figure has no data": ('"data":[{', '"data":[],"rest":[{'),
    "a script has an error": ("</main>", "</main><script>nowhere();</script>"),
    "a script says an error": ("</main>", "</main><script>console.error('no');</script>"),
    "something is fetched": ("</main>", '</main><img src="http://127.0.0.1:9/a.png">'),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_page_is_found_out(
    what: str, report: Path, browser: Browser, tmp_path: Path
) -> None:
    old, new = DAMAGE[what]
    text = report.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "damaged.html"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    browser.open(path)
    with pytest.raises(AssertionError):
        assert_whole(browser, len(CHARTS), path)
    said = browser.evaluate("document.querySelector('.plot').textContent")
    if what == "plotly is left out":
        assert said.startswith("This figure could not be drawn (Plotly is not defined)")


def test_a_machine_without_chromium_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browsers.shutil, "which", lambda name: None)
    with pytest.raises(AssertionError, match="apt-get install chromium"):
        Browser(tmp_path)
