"""The report in a real browser: on paper, with films, and while runs train."""

import base64
import shutil
from pathlib import Path

import pytest
from integration import report_fixture
from integration.report_fixture import PROMPTS, as_films, build_experiment, prompt_id, write_report
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from system.browsing import AXE, show

from vipo.config.compose import load_config_file
from vipo.reporting.watch import build_live

pytestmark = pytest.mark.browser
THREE = {"base": [0], "grpo": [0], "vipo": [0]}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, runs = build_experiment(tmp_path_factory.mktemp("paper"), kept=True)
    return write_report(folder, runs, folder / "report").as_uri()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_fixture, "PROMPTS", PROMPTS[:2])
        folder, runs = build_experiment(tmp_path_factory.mktemp("films"), THREE, kept=True)
    as_films(folder, runs)
    return write_report(folder, runs, folder / "report").as_uri()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and GRPO evaluated, ViPO after five updates."""
    folder, runs = build_experiment(tmp_path_factory.mktemp("live"), THREE)
    for run in runs[1:]:
        shutil.copy(folder / "evaluation" / run / "config.yaml", folder / "runs" / run / "config.yaml")
    shutil.rmtree(folder / "evaluation" / "vipo-s0")
    metrics = folder / "runs" / "vipo-s0" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:5]))
    return build_live(folder, runs, load_config_file(folder / "evaluation" / "base-s0" / "config.yaml"))


def test_paper_is_light_and_nothing_is_cut_at_its_edge(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page, "dark", width=720, media="print")
    style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    assert browser.execute_script(style) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    wash = "return getComputedStyle(document.querySelector('.against.tone-shift')).backgroundColor"
    assert min(map(int, browser.execute_script(wash).removeprefix("rgb(").removesuffix(")").split(","))) > 200
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(item => item.checkVisibility())"
        ".filter(item => item.getBoundingClientRect().right > innerWidth + 1)"
        ".filter(item => !item.closest('svg')).map(item => item.outerHTML.slice(0, 80))"
    )
    assert beyond == []
    # What the differences are to stays told; the folded intervals are printed.
    shown = "return [...document.querySelectorAll('.choice label')].filter(item => item.checkVisibility()).length"
    assert browser.execute_script(shown) == 1
    assert browser.execute_cdp_cmd("Page.printToPDF", {})["data"]


def test_an_open_prompt_is_printed_alone(browser: webdriver.Chrome, page: str) -> None:
    show(browser, f"{page}#prompt-{prompt_id(PROMPTS[1])}", media="print")
    assert not browser.find_element(By.TAG_NAME, "main").is_displayed()
    assert browser.find_element(By.ID, "viewer-title").is_displayed()
    assert browser.find_element(By.CSS_SELECTOR, ".viewer-scores").is_displayed()
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 2


def test_back_closes_a_prompt_and_a_kept_update_is_not_taken_for_the_final_one(
    browser: webdriver.Chrome, page: str
) -> None:
    show(browser, page)
    source = "return document.querySelector('.stage .after img')?.src"

    def after() -> str:
        """Of the opened viewer: it opens when the address has changed."""
        found: str = WebDriverWait(browser, 60).until(lambda _: browser.execute_script(source))
        return found

    link = browser.find_element(By.CSS_SELECTOR, f"#prompt-{prompt_id(PROMPTS[1])} .open")
    link.send_keys(Keys.ENTER)
    final = after()
    browser.back()
    WebDriverWait(browser, 60).until(lambda _: browser.find_element(By.ID, "viewer").get_attribute("open") is None)
    score = f"return document.querySelector('#prompt-{prompt_id(PROMPTS[1])} figure[data-run=\"vipo-s0\"] .score')"
    first = browser.execute_script(f"{score}.textContent")
    browser.find_element(By.ID, "update").send_keys(Keys.HOME)
    # The score is that of the picture which is shown, and the count tells which update it is.
    assert browser.execute_script(f"{score}.textContent") != first
    assert browser.find_element(By.ID, "count").text.endswith(", at update 8")
    assert browser.find_element(By.ID, "update").get_attribute("aria-valuetext") == "8"
    link.send_keys(Keys.ENTER)
    assert after() == final
    split = browser.find_element(By.ID, "viewer-split")
    split.send_keys(Keys.END)
    assert split.get_attribute("aria-valuetext") == "100 % base"


def test_a_zoomed_picture_is_moved_by_keys(browser: webdriver.Chrome, page: str) -> None:
    show(browser, f"{page}#prompt-{prompt_id(PROMPTS[1])}")
    stage = browser.find_element(By.CSS_SELECTOR, ".stage")
    stage.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    at = "const s = arguments[0].style; return [s.getPropertyValue('--at-x'), s.getPropertyValue('--at-y')]"
    assert browser.execute_script(at, stage) == ["60%", "70%"]
    assert browser.execute_script("return location.hash") == f"#prompt-{prompt_id(PROMPTS[1])}"


def test_a_long_prompt_is_scrolled_by_keyboard(browser: webdriver.Chrome, page: str) -> None:
    title = "return document.getElementById('viewer-title').tabIndex"
    for text, index in ((PROMPTS[4], 0), (PROMPTS[1], -1)):
        show(browser, f"{page}#prompt-{prompt_id(text)}")
        assert browser.execute_script(title) == index


@pytest.mark.parametrize("width", [400, 1280])
def test_pictures_of_the_first_screen_are_whole(browser: webdriver.Chrome, page: str, width: int) -> None:
    show(browser, page, width=width)
    ratios = browser.execute_script(
        "return [...document.querySelectorAll('.see .shot')].map(item => item.clientWidth / item.clientHeight)"
    )
    assert ratios == pytest.approx([1.0] * len(ratios), abs=0.02)


FILMS = """return [...document.querySelector(".samples").querySelectorAll("video")]
  .filter(film => film.checkVisibility())
  .map(film => [film.className, film.paused, film.controls, !!film.poster])"""


def test_films_of_a_prompt_play_together_with_and_without_their_maps(browser: webdriver.Chrome, films: str) -> None:
    show(browser, films)
    button = browser.find_element(By.CSS_SELECTOR, ".samples .play")
    assert browser.execute_script(FILMS) == [["plain", True, False, True]] * 3
    button.send_keys(Keys.ENTER)
    assert browser.execute_script(FILMS) == [["plain", False, False, True]] * 3
    assert button.get_attribute("aria-label") == "Pause the videos of this prompt"
    maps = browser.find_element(By.ID, "maps")
    maps.send_keys(Keys.SPACE)
    assert browser.execute_script(FILMS) == [["mapped", False, False, True]] * 3
    button.send_keys(Keys.ENTER)
    assert browser.execute_script(FILMS) == [["mapped", True, False, True]] * 3
    # Of a kept update there are no maps; the base has one update alone.
    browser.find_element(By.ID, "update").send_keys(Keys.HOME)
    assert [name for name, *_ in browser.execute_script(FILMS)] == ["mapped", "plain", "plain"]
    assert browser.get_log("browser") == []


def test_a_film_is_held_and_moved_through_in_the_viewer(browser: webdriver.Chrome, films: str) -> None:
    show(browser, films)
    # The driver's own click would not wait for the page's smooth scrolling.
    shot = browser.find_element(By.CSS_SELECTOR, ".samples figure[data-run='grpo-s0'] .shot video")
    browser.execute_script("arguments[0].click()", shot)
    dialog = browser.find_element(By.ID, "viewer")
    assert dialog.find_element(By.ID, "viewer-right").get_attribute("value") == "grpo-s0"
    times = "return [...document.querySelectorAll('.stage video')].map(film => [film.paused, film.currentTime])"
    lengths = "return [...document.querySelectorAll('.stage video')].every(film => film.duration)"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(lengths))
    dialog.find_element(By.ID, "viewer-time").send_keys(Keys.END)
    held = browser.execute_script(times)
    assert [paused for paused, _ in held] == [True, True]
    assert min(time for _, time in held) > 0.5
    dialog.find_element(By.ID, "viewer-map").send_keys(Keys.SPACE)
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(lengths))
    assert min(time for _, time in browser.execute_script(times)) > 0.5
    assert browser.get_log("browser") == []


def test_films_have_controls_without_the_script(browser: webdriver.Chrome, films: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, films)
        assert all(film.get_attribute("controls") for film in browser.find_elements(By.TAG_NAME, "video"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_page_of_runs_that_train_leads_only_to_what_is_there(browser: webdriver.Chrome, live: Path) -> None:
    show(browser, live.as_uri())
    assert browser.get_log("browser") == []
    links = "return [...document.querySelectorAll('a[href]')].map(item => item.getAttribute('href'))"
    found = [link for link in browser.execute_script(links) if not link.startswith("#")]
    assert found
    assert [link for link in found if not (live.parent / link).exists()] == []
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#progress tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )
    told = {row[0].strip(): (row[1], row[3]) for row in rows}
    assert told["vipo-s0"] == ("5 of 24", "not yet")
    assert told["grpo-s0"] == ("24 of 24", "yes")
    assert told["inverted-s0"] == ("not begun", "not yet")
    renew = browser.find_element(By.ID, "renew")
    assert renew.is_displayed()
    assert renew.is_selected()
    browser.get(f"{live.as_uri()}#prompt-{prompt_id(PROMPTS[1])}")
    original = browser.execute_script("return document.querySelector('.viewer-controls a').getAttribute('href')")
    assert (live.parent / original).is_file()


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: 'make axe' gets it from npm")
@pytest.mark.parametrize("which", ["films", "live"])
def test_axe_finds_nothing(browser: webdriver.Chrome, films: str, live: Path, which: str) -> None:
    show(browser, films if which == "films" else live.as_uri())
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run(document).then(found => arguments[0](found.violations))")
    assert [(item["id"], item["nodes"][0]["target"]) for item in found] == []
