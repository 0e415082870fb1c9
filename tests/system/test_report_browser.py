"""The report in a real browser: silent, offline, readable in light and dark, narrow and wide."""

import json
import shutil
from collections.abc import Iterator

import pytest
from integration.report_fixture import HOSTILE, build_experiment, write_report
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

pytestmark = pytest.mark.browser

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# WCAG 2 contrast of an element's text with the first opaque ground behind it.
CONTRAST = """
const parse = text => text.match(/[\\d.]+/g).map(Number);
const luminance = rgb => {
  const [r, g, b] = rgb.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const ground = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = parse(getComputedStyle(e).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
return arguments[0].flatMap(selector => [...document.querySelectorAll(selector)].map(element => {
  const style = getComputedStyle(element);
  const ink = parse(element instanceof SVGElement ? style.fill : style.color);
  const host = element instanceof SVGElement ? element.closest('figure') : element;
  const [high, low] = [luminance(ink), luminance(ground(host))].sort((a, b) => b - a);
  return [selector, (high + .05) / (low + .05)];
}));
"""
TEXTS = [
    "h1", "h2", ".question", ".lead", "nav a", ".verdict .words", ".verdict .numbers", ".findings li", ".numbers",
    ".caveats li", "td", "th", "caption", ".badge", ".interval", "figcaption", "figcaption small", "dt", "dd",
    "summary", "details pre", "pre mark", "footer", "footer code", "svg text", ".checks li",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, runs = build_experiment(tmp_path_factory.mktemp("browser"))
    return write_report(folder, runs, folder / "report").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "no chromium: apt-get install chromium chromium-driver"
    assert driver, "no chromedriver: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def show(browser: webdriver.Chrome, page: str, scheme: str = "light", width: int = 1280) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get(page)
    browser.execute_script("document.querySelectorAll('details').forEach(item => { item.open = true; })")


def test_it_opens_without_errors_or_outside_requests(browser: webdriver.Chrome, page: str) -> None:
    browser.get_log("performance")
    show(browser, page)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert page in sent
    assert [url for url in sent if url != page and not url.startswith("data:")] == []
    entries = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [url for url in entries if not url.startswith("data:")] == []
    pictures = browser.execute_script("return [...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(pictures) == 5 * 5 * 2
    assert all(complete and width == 64 for complete, width in pictures)
    style = "return getComputedStyle(document.querySelector('.samples img')).imageRendering"
    assert browser.execute_script(style) == "pixelated"


def test_prompts_are_text(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    assert browser.title == "Redder objects from captions that name no colour · vipo report"
    shown = browser.execute_script("return [...document.querySelectorAll('.prompt h3')].map(item => item.textContent)")
    assert HOSTILE in shown
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return document.querySelectorAll('img[onerror]').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(browser: webdriver.Chrome, page: str, scheme: str) -> None:
    show(browser, page, scheme)
    ratios = browser.execute_script(CONTRAST, TEXTS)
    assert {selector for selector, _ in ratios} == set(TEXTS)
    low = sorted((round(ratio, 2), selector) for selector, ratio in ratios if ratio < 4.5)
    assert low == []
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(ground.removeprefix("rgb(").split(",")[0]) < 128) == (scheme == "dark")


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overflows(browser: webdriver.Chrome, page: str, width: int) -> None:
    show(browser, page, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Wide tables and listings scroll inside themselves; nothing else reaches beyond the window.
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('body *')]"
        ".filter(item => item.getBoundingClientRect().right > innerWidth + 1)"
        ".filter(item => !item.closest('.scroll, pre, .skip, svg')).map(item => item.outerHTML.slice(0, 80))"
    )
    assert beyond == []


def test_sections_are_reached_by_their_links(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    targets = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].map(link => [link.hash, !!document.querySelector(link.hash)])"
    )
    assert len(targets) == 10
    assert all(found for _, found in targets)
