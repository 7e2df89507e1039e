"""Tests of a search's report: what is written, and what a browser makes of it."""

import json
import re
import shutil

import numpy as np
import pytest

from dybit.errors import DyBitError
from dybit.report.charts import Point, Row
from dybit.report.search_page import SearchReport, write_report

pytest.importorskip("plotly")

CANDIDATES = ("8/8", "4/8", "2/4")
CHARTS = ("pareto", "strip", "sensitivity", "costs", "histogram", "rivals")


def rows(count: int = 12) -> list[Row]:
    generator = np.random.default_rng(0)
    result = []
    for index in range(count):
        counts, edges = np.histogram(generator.normal(size=2000), bins=41, range=(-4, 4))
        result.append(
            Row(
                name=f"blocks.{index}.<conv>&",
                kind="64 x 32 x 16",
                weights=(8, 4, 2, 0)[index % 4],
                activations=8,
                cost=1000.0 + index,
                bound=("compute", "memory")[index % 2],
                errors=(1e-4, 1e-3, None if index == 3 else 1e-2),
                edges=edges.tolist(),
                counts=counts.tolist(),
                levels=[-3.0, -1.0, 0.0, 1.0, 3.0, 9.0],
                format="s4r2spare",
            )
        )
    return result


def report(**changes: object) -> SearchReport:
    layers = rows()
    bits = [row.weights for row in layers]
    front = [Point(f"recipe {i}", 1 + i, 0.001 * 3**i, f'{{"weights": {i}}}', bits, [8] * 12) for i in range(6)]
    given = {
        "title": "A <model> at 4×",
        "subtitle": "Twelve layers",
        "headline": [("size", "3.1 MB"), ("speed", "4.02×")],
        "command": "dybit search <model> --speedup 4",
        "machine": "a machine",
        "unit": "cycles",
        "front": front,
        "uniform": [Point("8/8", 1.0, 0.002), Point("4/4", 2.5, 0.1)],
        "chosen": front[3],
        "rows": layers,
        "candidates": CANDIDATES,
        "choices": [0, 1, 2, None] * 3,
        "rivals": [("nf4", 20.1, False), ("dybit4", 20.4, True)],
    }
    return SearchReport(**{**given, **changes})  # type: ignore[arg-type]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, report())
    return path


def test_the_page_is_one_file_that_asks_the_network_for_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 6_000_000 and [p.name for p in page.parent.iterdir()] == ["report.html"]
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)


def test_what_comes_from_outside_is_escaped(page):
    text = page.read_text(encoding="utf-8")
    assert "<model>" not in text and "<conv>" not in text and "A &lt;model&gt; at 4×" in text
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    charts = json.loads(data[1])["charts"]
    assert charts["sensitivity"]["data"][0]["y"][0] == "blocks.0.<conv>&"


def test_parts_without_figures_are_left_out(tmp_path):
    write_report(tmp_path / "r.html", report(front=(), uniform=(), chosen=None, rivals=(), candidates=()))
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'id="strip"' in text and 'id="pareto"' not in text and 'id="rivals"' not in text


def test_bad_figures_and_paths_leave_no_file(tmp_path):
    with pytest.raises(DyBitError, match="not finite"):
        write_report(tmp_path / "r.html", report(uniform=[Point("8/8", 1.0, float("nan"))]))
    with pytest.raises(DyBitError, match="output must be a file that can be written"):
        write_report(tmp_path / "nowhere" / "r.html", report())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (chromium := shutil.which("chromium")) or not (driver := shutil.which("chromedriver")):
        pytest.skip("needs Chromium and ChromeDriver (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


def wait(browser, script: str, seconds: float = 30.0):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda b: b.execute_script(f"return {script}"))


@pytest.mark.filterwarnings("default")  # of selenium's own sockets
def test_in_a_browser(browser, page, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    browser.set_window_size(1200, 900)
    browser.get(page.as_uri())
    theme = wait(browser, "document.documentElement.dataset.drawn")
    for name in CHARTS:
        assert browser.execute_script(f"return document.querySelectorAll('#{name} svg.main-svg').length") > 0, name
    # The bars of the histogram, a trace of every kind and a cell's text are really there.
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(count, "#histogram .bars .point") > 20
    assert browser.execute_script(count, "#pareto .scatterlayer .trace") == 3
    assert browser.execute_script(count, "#strip .hm image, #strip .heatmaplayer image") > 0

    point = browser.find_elements("css selector", "#pareto .scatterlayer .trace:first-child path.point")[2]
    webdriver.ActionChains(browser).move_to_element(point).pause(0.3).click().perform()
    wait(browser, "!document.getElementById('recipe').hidden")
    assert "recipe 2: 3.00×" in browser.find_element("id", "recipe").text
    assert '"weights": 2' in browser.find_element("id", "recipe-text").text

    browser.execute_script(
        "const s = document.getElementById('histogram-choice'); s.value = '3'; s.dispatchEvent(new Event('change'))"
    )
    other = "light" if theme == "dark" else "dark"
    browser.find_element("id", "theme").click()
    wait(browser, f"document.documentElement.dataset.drawn === '{other}'")
    for name, width in ((other, 1200), (other + "-phone", 390)):
        browser.set_window_size(width, 900)
        wait(browser, "document.querySelector('#pareto .main-svg').clientWidth <= window.innerWidth")
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), width
        assert browser.save_screenshot(str(tmp_path / f"{name}.png"))
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe
