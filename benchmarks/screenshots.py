"""Pictures of a report for the README and the docs, from real results: `make screenshots`.

    python benchmarks/screenshots.py results/demo/report/index.html -o docs/images

Needs Debian's chromium and chromium-driver. Nothing is posed: the first screen as it opens, the maps over the first
prompts, as many as are seen whole, and the first held-out prompt looked at closely.
"""

import argparse
import base64
import shutil
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_WIDTH, _HEIGHT = 1280, 860
# Where the last row of prompts ends that is seen whole.
_WHOLE_ROWS = """
return Math.max(...[...document.querySelectorAll(".prompt")].map(item => item.getBoundingClientRect().bottom)
  .filter(bottom => bottom <= innerHeight)) + 12
"""
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")


def main() -> None:
    """Write ``report.png``, ``report-maps.png`` and ``report-prompt.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="index.html of a report")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args()
    page: Path = arguments.page.resolve(strict=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = _browser(profile)
        try:
            _shoot(browser, page.as_uri(), arguments.output)
        finally:
            browser.quit()


def _browser(profile: str) -> webdriver.Chrome:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise SystemExit("error: no chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    size = {"width": _WIDTH, "height": _HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    return browser


def _shoot(browser: webdriver.Chrome, url: str, output: Path) -> None:
    browser.get(url)
    # A link's scrolling that is still under way would be half in the picture.
    browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    _save(browser, output / "report.png")
    browser.execute_script("document.querySelector('#maps').click()")
    browser.execute_script("document.querySelector('#samples').scrollIntoView({behavior: 'instant'})")
    _save(browser, output / "report-maps.png", browser.execute_script(_WHOLE_ROWS))
    browser.execute_script("document.querySelector('#maps').click()")
    browser.execute_script("location.hash = document.querySelector('.prompt .open').hash")
    _save(browser, output / "report-prompt.png")


def _save(browser: webdriver.Chrome, path: Path, height: float = _HEIGHT) -> None:
    """What is seen, from its top down to `height`."""
    # A map above what is seen, shown and scrolled away at once, is never loaded, and there is no waiting for it.
    seen = (
        "[...document.images].filter(item => item.checkVisibility() && item.getBoundingClientRect().top < innerHeight"
        " && item.getBoundingClientRect().bottom > 0)"
    )
    browser.execute_async_script(f"Promise.all({seen}.map(item => item.decode())).then(arguments[0], arguments[0])")
    left, top = browser.execute_script("return [scrollX, scrollY]")
    clip = {"x": left, "y": top, "width": _WIDTH, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))
    print(path)


if __name__ == "__main__":
    main()
