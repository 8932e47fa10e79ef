"""The report as a reader sees it: one file, opened in a browser without a network."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from workflows import PAIR, snakemake

pytest.importorskip("snakemake", reason="the workflow extra is not installed")
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("report")]  # one report and one browser for all
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver")


@pytest.fixture(scope="module")
def report(folder):
    snakemake(folder, "--report", "report.html", "quick")
    return folder / "report.html"


def test_the_report_holds_captions_and_results(report):
    text = report.read_text()
    for caption in (
        "Table I: run quick",
        "Figure 2: accuracy of the unprotected networks",
        "Figure 7: accuracy of CorrectNet",
        "Figure 9: accuracy of the network trained under",
        "Figure 10: the states that the search explored",
        "Every row of Table I at its",
        "Yield: the fraction of chips",
        "Sensitivity: the accuracy lost",
        "Table I: accuracy of each network-data pair",
    ):
        assert caption in text
    for name in ("figure-10.svg", "search.html", "provenance.html", "table1.csv", "samples.csv"):
        assert name in text


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # No name resolves: what the report does not carry itself is not there.
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update"]
    quiet = ["--no-first-run", "--disable-sync", "--disable-gpu", "--disable-quic", "--no-sandbox"]
    for argument in ("--headless=new", "--window-size=1400,1000", *offline, *quiet):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(10)
    yield driver
    driver.quit()


def show(browser, report, category, result):
    """Open the report, a category, and a result in it, as a reader would: by clicking."""
    browser.get(report.as_uri())
    browser.find_element("xpath", f"//*[text()='{category}']").click()
    browser.find_element("xpath", f"//tr[contains(., '{result}')]//a[1]").click()


def pixels(element):
    """A screenshot of an element, as an array."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"))


def colours(picture, colour, tolerance=40):
    """The number of pixels that have a colour, approximately."""
    return int((np.abs(picture.astype(int) - colour).sum(axis=2) < tolerance).sum())


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


@needs_browser
def test_it_opens_with_table1_and_the_figure_of_all_rows(report, browser):
    """Without a click and without scrolling; the graph of rules comes after them."""
    browser.get(report.as_uri())
    table, figure = (browser.find_element("css selector", f".correctnet {kind}") for kind in ("table", "svg"))
    rows = [row.text for row in table.find_elements("tag name", "tr")]
    assert len(rows) == 1 + len(PAIR["rows"])
    assert rows[3].startswith("CorrectNet")
    assert "overhead" in rows[0]
    assert 0 < table.rect["y"] < figure.rect["y"]
    assert figure.rect["y"] + figure.rect["height"] < 1000
    shot = pixels(figure)
    assert min(colours(shot, BLUE), colours(shot, ORANGE)) > 20
    graph = browser.find_element("css selector", "svg.marks, canvas.marks")
    assert graph.rect["y"] > figure.rect["y"] + figure.rect["height"]
    browser.find_element("link text", "2. Figures").click()
    assert browser.find_element("xpath", "//tr[contains(., 'Figure 7:')]").is_displayed()


@needs_browser
def test_table1_is_shown(report, browser):
    show(browser, report, "1. Table I", "beside the paper")
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    rows = browser.find_elements("tag name", "tr")
    assert len(rows) == 1 + len(PAIR["rows"])
    assert "CorrectNet" in rows[3].text
    assert rows[0].text.split()[:3] == ["pair", "row", "clean"]


@needs_browser
@pytest.mark.parametrize(
    "figure", ["Figure 2:", "Figure 7:", "Figure 9:", "Figure 10:", "All rows", "Yield", "Sensitivity"]
)
def test_figures_are_drawn(report, browser, figure):
    show(browser, report, "2. Figures", figure)
    picture = browser.find_element("xpath", "//img[contains(@src, 'figure-')]")
    assert int(picture.get_property("naturalWidth")) > 100, "it could be decoded"
    shot = pixels(picture)
    assert max(colours(shot, BLUE), colours(shot, ORANGE)) > 50


# What a reader sees as text: that of Bokeh's shadow trees too, and no scripts.
DEEP_TEXT = """
const text = node => node.nodeType === 3 ? node.textContent : ["SCRIPT", "STYLE"].includes(node.nodeName) ? "" :
    [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes].map(text).join(" ")
return text(document.body)
"""
# Where the state without compensation (overhead 0) is drawn.
POSITION = """
const view = Bokeh.index.roots[0].child_views[0], columns = view.model.renderers[0].data_source.data
const i = Array.from(columns.x).indexOf(0), box = view.canvas_view.el.getBoundingClientRect()
return [box.x + view.frame.x_scale.compute(0), box.y + view.frame.y_scale.compute(columns.y[i])]
"""


@needs_browser
def test_the_search_can_be_explored(report, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, report, "3. Search", "states")
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    plots, wait = browser.find_element("id", "plots"), WebDriverWait(browser, 20)
    wait.until(lambda _: browser.execute_script("return Bokeh.documents[0] && Bokeh.documents[0].is_idle"))
    assert colours(pixels(plots), BLUE) > 20, "states are drawn"
    assert "no compensation" not in browser.execute_script(DEEP_TEXT)
    (x, y), body = browser.execute_script(POSITION), browser.find_element("tag name", "body")
    middle = body.rect["x"] + body.rect["width"] / 2, body.rect["y"] + body.rect["height"] / 2
    move = ActionChains(browser).move_to_element_with_offset(body, x - middle[0], y - middle[1])
    move.perform()
    wait.until(lambda _: "no compensation" in browser.execute_script(DEEP_TEXT))


@needs_browser
def test_provenance_is_shown(report, browser):
    show(browser, report, "4. Provenance", "jobs")
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    text = browser.find_element("tag name", "body").text
    assert "one/pretrain" in text
    assert "--cores 2 quick" in text
    assert "torch 2" in text


@needs_browser
def test_nothing_went_wrong_in_the_browser(report, browser):
    browser.get(report.as_uri())
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
