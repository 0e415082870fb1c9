"""The report in a real browser: silent, offline, readable in light and dark, narrow and wide."""

import json
from pathlib import Path

import pytest
from integration import report_fixture
from integration.report_fixture import HOSTILE, PROMPTS, build_experiment, prompt_id, write_report
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from system.browsing import AXE, show

from vipo.reporting import pictures as page_pictures

pytestmark = pytest.mark.browser

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
    "h1", "h2", ".question", ".lead", "nav a", ".verdict", ".headline-figure", ".numbers", ".sides", ".reach",
    ".findings li", ".caveats li", "td", "th", "caption", ".badge", ".interval", ".against", "figcaption",
    "figcaption small", "dt", "dd", "summary", "details pre", "pre mark", "footer", "footer code", "svg text",
    ".checks li", ".controls label", ".flat li", ".legend .arm", ".see-prompt a", ".strip-text", ".score",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, runs = build_experiment(tmp_path_factory.mktemp("browser"), kept=True)
    return write_report(folder, runs, folder / "report").as_uri()


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
    browser.execute_script("document.querySelector('#maps').click()")
    browser.execute_script("document.querySelectorAll('img').forEach(item => { item.loading = 'eager'; })")
    decoded = "return Promise.all([...document.images].map(item => item.decode().then(() => item.naturalWidth)))"
    widths = browser.execute_script(decoded)
    assert set(widths) == {64, 192}
    style = "return getComputedStyle(document.querySelector('.samples .plain')).imageRendering"
    assert browser.execute_script(style) == "pixelated"


def test_prompts_are_text(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    assert browser.title == "Redder objects from captions that name no colour · vipo report"
    shown = browser.execute_script("return [...document.querySelectorAll('.prompt h3')].map(item => item.textContent)")
    assert HOSTILE in shown
    # Also where the script makes them anew.
    show(browser, f"{page}#prompt-{prompt_id(HOSTILE)}")
    assert browser.find_element(By.ID, "viewer-title").text == HOSTILE
    assert browser.title == "Redder objects from captions that name no colour · vipo report"
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.execute_script("return document.querySelectorAll('[onerror], [onload], [onclick]').length") == 0
    assert browser.get_log("browser") == []


def test_another_script_does_not_run(browser: webdriver.Chrome, page: str, tmp_path: Path) -> None:
    """The policy itself, as if escaping had failed."""
    text = Path(page.removeprefix("file://")).read_text(encoding="utf-8")
    injected = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<main>", f"<main>{injected}", 1), encoding="utf-8")
    show(browser, broken.as_uri())
    assert "owned" not in browser.title
    assert len(browser.get_log("browser")) >= 2


def test_a_prompt_has_a_link_and_is_looked_at_by_keyboard(browser: webdriver.Chrome, page: str) -> None:
    first, second = prompt_id(PROMPTS[1]), prompt_id(PROMPTS[2])
    show(browser, f"{page}#prompt-{first}")
    dialog = browser.find_element(By.ID, "viewer")
    assert dialog.get_attribute("open") is not None
    assert dialog.find_element(By.TAG_NAME, "h2").text == PROMPTS[1]
    runs = [item.text.split("\n")[0] for item in dialog.find_elements(By.CSS_SELECTOR, ".runs button")]
    assert [name.rpartition(" ")[0] or name for name in runs][:3] == ["base", "grpo, seed 0", "grpo, seed 1"]
    split = dialog.find_element(By.ID, "viewer-split")
    split.send_keys(Keys.HOME)
    assert browser.execute_script("return document.querySelector('.stage').style.getPropertyValue('--split')") == "0%"
    dialog.find_element(By.ID, "viewer-map").send_keys(Keys.SPACE)
    assert len(dialog.find_elements(By.CSS_SELECTOR, ".stage .veil-shown")) == 2
    dialog.find_element(By.XPATH, ".//button[@aria-label='Next prompt']").send_keys(Keys.ENTER)
    assert browser.execute_script("return location.hash") == f"#prompt-{second}"
    dialog.send_keys(Keys.ESCAPE)
    assert dialog.get_attribute("open") is None
    focused = browser.switch_to.active_element
    assert focused.get_attribute("href").endswith(f"#prompt-{second}")


def test_prompts_are_found_ordered_and_moved_through_updates(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    find = browser.find_element(By.ID, "find")
    find.send_keys("small number 3")
    shown = "return [...document.querySelectorAll('.prompt:not([hidden]) h3')].map(item => item.textContent)"
    assert browser.execute_script(shown) == ["a small square on the left, number 3"]
    assert browser.find_element(By.ID, "count").text == "1 of 10 prompts"
    find.send_keys(Keys.CONTROL, "a")
    find.send_keys(Keys.DELETE)
    order = "const s = document.querySelector('#order'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    gains = """return [...document.querySelectorAll('.prompt')].map(card =>
      Number(card.querySelector('figure[data-run="vipo-s0"] .gain').textContent.replace('−', '-')))"""
    browser.execute_script(order, "vipo|reward/object_redness|down")
    ordered = browser.execute_script(gains)
    assert ordered == sorted(ordered, reverse=True)
    browser.execute_script(order, "")
    assert browser.execute_script(gains) != ordered
    slider = browser.find_element(By.ID, "update")
    source = "return document.querySelector('.prompt figure[data-run=\"vipo-s0\"] .plain').src"
    final = browser.execute_script(source)
    slider.send_keys(Keys.HOME)
    assert browser.find_element(By.ID, "update-shown").text == "8"
    assert browser.execute_script(source) != final
    slider.send_keys(Keys.END)
    assert browser.execute_script(source) == final


def test_charts_tell_values_and_light_one_arm(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    key = browser.find_element(By.CSS_SELECTOR, "#training .legend .arm[data-arm='2']")
    key.send_keys(Keys.ENTER)
    assert key.get_attribute("aria-pressed") == "true"
    dimmed = "return [...document.querySelectorAll('svg .dim')].map(item => item.dataset.arm)"
    others = set(browser.execute_script(dimmed))
    assert others == {"1", "3", "4"} or others == {"0", "1", "3", "4"}
    key.send_keys(Keys.ENTER)
    assert browser.execute_script(dimmed) == []
    told = browser.execute_script("""
      const chart = document.querySelector('#training svg[data-points]');
      chart.scrollIntoView({block: 'center', behavior: 'instant'});
      const [x, y, text] = JSON.parse(chart.dataset.points)[0];
      const place = new DOMPoint(x, y).matrixTransform(chart.getScreenCTM());
      chart.dispatchEvent(new PointerEvent('pointermove', {clientX: place.x, clientY: place.y, bubbles: true}));
      const tip = document.querySelector('.tip');
      return [tip.hidden, tip.textContent, text];""")
    assert told[0] is False
    assert told[1].split(":")[1] == told[2].split(":")[1]


def test_the_matrix_is_sorted_by_a_column(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    browser.find_element(By.CSS_SELECTOR, "#comparison-table thead th:nth-child(3) button").send_keys(Keys.ENTER)
    values = (
        "return [...document.querySelectorAll('#comparison-table tbody tr')].map(row => +row.cells[2].dataset.value)"
    )
    found = browser.execute_script(values)
    assert found == sorted(found, reverse=True)
    head = browser.find_element(By.CSS_SELECTOR, "#comparison-table thead th:nth-child(3)")
    assert head.get_attribute("aria-sort") == "descending"
    # And a table whose cells hold text alone.
    browser.find_element(By.CSS_SELECTOR, "#change thead th:nth-child(2) button").send_keys(Keys.ENTER)
    cells = "return [...document.querySelectorAll('#change tbody tr')].map(row => parseFloat(row.cells[1].textContent))"
    found = browser.execute_script(cells)
    assert len(found) == 4
    assert found == sorted(found, reverse=True)


def test_without_its_script_everything_is_there(browser: webdriver.Chrome, page: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, page)
        assert len(browser.find_elements(By.CSS_SELECTOR, ".prompt .plain")) == len(PROMPTS) * 5
        assert not browser.find_element(By.ID, "find").is_displayed()
        assert browser.find_element(By.CSS_SELECTOR, ".headline-figure").is_displayed()
        assert browser.find_element(By.ID, "maps").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: 'make axe' gets it from npm")
@pytest.mark.parametrize(("scheme", "place"), [("light", ""), ("dark", ""), ("light", "viewer"), ("dark", "viewer")])
def test_axe_finds_nothing(browser: webdriver.Chrome, page: str, scheme: str, place: str) -> None:
    show(browser, f"{page}#prompt-{prompt_id(PROMPTS[1])}" if place else page, scheme)
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run(document).then(found => arguments[0](found.violations))")
    told = [(item["id"], node["target"], node["failureSummary"]) for item in found for node in item["nodes"][:2]]
    assert told == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """2,000 prompts, whose pictures lie beside the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_pictures, "INLINE_BYTES", 2**20)
        prompts = [*PROMPTS, *(f"prompt number {number}" for number in range(2000 - len(PROMPTS)))]
        patch.setattr(report_fixture, "PROMPTS", prompts)
        patch.setattr(report_fixture, "SAMPLES", 1)
        folder, runs = build_experiment(tmp_path_factory.mktemp("large"), {"base": [0], "grpo": [0], "vipo": [0]})
        return write_report(folder, runs, folder / "report").as_uri()


@pytest.mark.parametrize("width", [390, 1280])
def test_two_thousand_prompts_are_loaded_as_they_are_seen(browser: webdriver.Chrome, large: str, width: int) -> None:
    browser.get_log("performance")
    show(browser, large, width=width)
    assert browser.get_log("browser") == []
    assert len(browser.find_elements(By.CSS_SELECTOR, ".prompt")) == 2000
    loaded = "return [...document.images].filter(item => item.complete && item.naturalWidth).length"
    assert 6 <= browser.execute_script(loaded) < 200
    timing = """
      return new Promise(resolve => {
        const seen = {paint: 0, shift: 0};
        new PerformanceObserver(list => list.getEntries().forEach(e => { seen.paint = e.startTime; }))
          .observe({type: 'largest-contentful-paint', buffered: true});
        new PerformanceObserver(list => list.getEntries().forEach(e => { seen.shift += e.value; }))
          .observe({type: 'layout-shift', buffered: true});
        setTimeout(() => resolve(seen), 500);
      });"""
    seen = browser.execute_script(timing)
    print(f"largest content after {seen['paint']:.0f} ms, layout shift {seen['shift']}")
    assert seen["paint"] > 0
    assert seen["shift"] == 0
    sent = {json.loads(entry["message"])["message"]["params"]["request"]["url"]
            for entry in browser.get_log("performance")
            if json.loads(entry["message"])["message"]["method"] == "Network.requestWillBeSent"}  # fmt: skip
    folder = large.rpartition("/")[0]
    assert {url for url in sent if not url.startswith((f"{folder}/", "data:"))} == set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(browser: webdriver.Chrome, page: str, scheme: str) -> None:
    show(browser, page, scheme)
    ratios = browser.execute_script(CONTRAST, TEXTS)
    assert {selector for selector, _ in ratios} == set(TEXTS)
    low = sorted((round(ratio, 2), selector) for selector, ratio in ratios if ratio < 4.5)
    assert low == []
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(ground.removeprefix("rgb(").split(",")[0]) < 128) == (scheme == "dark")


@pytest.mark.parametrize("width", [400, 1280, 1400])
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
    # The first screen is read without scrolling sideways.
    room = "const box = document.querySelector('.effects').parentElement; return box.scrollWidth - box.clientWidth"
    assert browser.execute_script(room) <= 0


def test_sections_are_reached_by_their_links(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    targets = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].map(link => [link.hash, !!document.querySelector(link.hash)])"
    )
    assert len(targets) == 12
    assert all(found for _, found in targets)
