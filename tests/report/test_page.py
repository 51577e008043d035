"""The HTML page in a real Chromium, with the network off: it draws, answers to hover and click, and prints."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hand_made import hostile
from long_series import series

from peelcli.report import render

pytest.importorskip("plotly")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver here (Debian: chromium chromium-driver)"
)

BAD = "</script><img src=x onerror='window.pwned=1'><b>&amp;%{x}\x1b[31m"
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1200,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    off = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", off)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> webdriver.Chrome:
    """Six checkpoints of five layers; the newest bears a hostile name wherever it can."""
    *older, newest = series(5, 6)
    verdict = replace(newest.layers[2], reason=BAD, notes=(BAD,))
    layers = (*newest.layers[:2], verdict, *newest.layers[3:])
    bad = hostile(BAD)
    run = replace(newest.run, checkpoint=BAD, data=BAD, family=BAD, findings=bad.run.findings)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render([*older, replace(newest, run=run, layers=layers)], "html"), encoding="ascii")
    browser.get(path.as_uri())
    wait(browser, "return document.documentElement.dataset.ready")
    return browser


def wait(browser: webdriver.Chrome, script: str, seconds: float = 60.0) -> object:
    """What `script` returns once it is true in JavaScript's sense."""
    end = time.monotonic() + seconds
    while not (found := browser.execute_script(script)):
        assert time.monotonic() < end, f"never came true: {script}"
        time.sleep(0.05)
    return found


def text(browser: webdriver.Chrome, selector: str) -> str:
    return browser.find_element("css selector", selector).text


def at_cell(browser: webdriver.Chrome, run: int, row: int, *, click: bool) -> None:
    """Move the pointer to a cell of the heat map, counted from 0."""
    script = """
      const node = document.getElementById("heat"), box = node.getBoundingClientRect(), l = node._fullLayout;
      return [box.x + l.xaxis._offset + l.xaxis.d2p(arguments[0]), box.y + l.yaxis._offset + l.yaxis.d2p(arguments[1])];
    """
    browser.execute_script("document.getElementById('heat').scrollIntoView({block: 'center'})")
    x, y = browser.execute_script(script, run, row)
    events = ["mouseMoved"] * 2 + (["mousePressed", "mouseReleased"] if click else [])
    for number, event in enumerate(events):
        pressed = {"button": "left", "clickCount": 1} if event.endswith("ed") and "Moved" not in event else {}
        mouse = {"type": event, "x": x + number % 2, "y": y, **pressed}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", mouse)
        time.sleep(0.1)


def test_it_draws_every_chart_without_a_complaint_or_a_request(page):
    assert page.execute_script("return document.documentElement.dataset.ready") == "yes", text(
        page, "#status"
    )
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = [of["request"]["url"] for of in sent if of["documentURL"].startswith("file:")]
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert len([url for url in asked if url.startswith("file:")]) == 1
    for chart in ("cloud", "heat", "maps", "gaps", "history"):
        assert page.execute_script(f"return document.querySelectorAll('#{chart} .main-svg').length") > 0, (
            chart
        )
    bands = page.execute_script("return document.querySelectorAll('#cloud .js-fill').length")
    assert bands == 3  # green, yellow, red


def test_names_are_text_wherever_they_stand(page):
    assert page.execute_script("return window.pwned") is None
    assert (
        page.execute_script("return document.querySelectorAll('main img, main b, main script').length") == 0
    )
    assert r"</script><img src=x onerror='window.pwned=1'><b>&amp;%{x}\x1b[31m" in text(page, "#detail")
    at_cell(page, 5, 2, click=False)
    label = wait(page, "return document.querySelector('#heat .hoverlayer .hovertext')?.textContent")
    # the label's second line is the checkpoint's name from its last slash on
    assert "onerror" not in BAD.rpartition("/")[0]
    assert "script><img src=x onerror='window.pwned=1'><b>&amp;%{x}" in str(label)


def test_a_script_from_elsewhere_is_refused(page):
    script = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    page.execute_script(script)
    assert page.execute_script("return window.ran") is None
    assert [entry for entry in page.get_log("browser") if "Content Security Policy" in entry["message"]]


def test_hover_shows_a_layer_and_click_holds_it(page):
    at_cell(page, 1, 3, click=False)
    wait(page, "return document.querySelector('#detail h3').textContent.startsWith('Layer 4 of #2 ')")
    at_cell(page, 3, 1, click=True)
    wait(page, "return document.querySelector('#detail h3').textContent.startsWith('Layer 2 of #4 ')")
    assert text(page, "#layers-title") == "Layers of #4 checkpoint-400, step 400"
    assert text(page, "#history-title") == "Layer 2 over the checkpoints"
    assert page.execute_script("return document.getElementById('run').value") == "3"
    assert "checkpoint-400" in text(page, "#about")
    at_cell(page, 0, 0, click=False)
    time.sleep(0.2)
    assert text(page, "#detail h3").startswith("Layer 2 of #4")  # held
    page.find_element("id", "unpin").click()
    at_cell(page, 0, 0, click=False)
    wait(page, "return document.querySelector('#detail h3').textContent.startsWith('Layer 1 of #1 ')")


def test_the_table_sorts_by_any_column_both_ways(page):
    column = "return [...document.querySelectorAll('#layers tbody tr')].map(r => r.cells[{}].textContent)"
    buttons = page.find_elements("css selector", "#layers thead button")
    for at, key in ((2, float), (0, lambda cell: int(cell.removeprefix("! ")))):
        page.execute_script("arguments[0].click()", buttons[at])
        first = [key(cell) for cell in page.execute_script(column.format(at))]
        page.execute_script("arguments[0].click()", buttons[at])
        second = [key(cell) for cell in page.execute_script(column.format(at))]
        assert sorted(first) in (first, first[::-1])
        assert first == second[::-1] != second
    assert page.execute_script("return document.querySelectorAll('#layers th[aria-sort]').length") == 1


def test_the_colours_of_the_heat_map_can_be_chosen(page):
    choice = "const c = document.getElementById('colour'); c.value = arguments[0]; c.dispatchEvent(new Event('change'))"
    for name in ("gap", "bits", "drop", "fvu", "verdict"):
        page.execute_script(choice, name)
        values = page.execute_script("return document.getElementById('heat').data[0].z.flat()")
        assert len([v for v in values if v is not None]) >= 5
    assert set(values) <= {0, 1, 2, 3, 4}


def test_both_themes(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(background)
    page.find_element("id", "theme").click()
    dark = page.execute_script(background)
    assert light != dark
    tick = "return getComputedStyle(document.querySelector('#gaps .xtick text')).fill"
    assert page.execute_script(tick) == "rgb(231, 233, 236)"
    page.find_element("id", "theme").click()
    assert page.execute_script(background) == light


def test_a_screen_or_a_phone_scrolls_down_only(page):
    assert page.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    phone = {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        wait(page, "return document.querySelector('#cloud .main-svg').getBoundingClientRect().width < 375")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 375
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        wait(page, "return document.querySelector('#cloud .main-svg').getBoundingClientRect().width > 800")


def test_paper_holds_the_tables_and_no_buttons(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = "return [...document.querySelectorAll('header button, select, .screen')].filter(n => n.offsetParent).length"
    assert page.execute_script(shown) == 0
    assert page.execute_script("return document.querySelector('#layers tbody').offsetParent !== null")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    widths = """
      const seen = [], add = () => seen.push(document.querySelector("#cloud .main-svg").getBoundingClientRect().width);
      window.widths = seen; add(); addEventListener("beforeprint", add); addEventListener("afterprint", add);
    """
    page.execute_script(widths)
    printed = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    before, paper, after = wait(page, "return window.widths.length === 3 && window.widths")
    assert (before, paper) == (after, 680)
