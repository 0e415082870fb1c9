"""The documentation site: it builds strictly, loads nothing from elsewhere, and its reference is whole."""

import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from vipo.cli import app
from vipo.config.compose import repository_root
from vipo.config.run import Config

ROOT = repository_root()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    warned: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    handler = Kept(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    # The theme sets it for all that comes after.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        try:
            build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False))
        finally:
            logging.getLogger("mkdocs").removeHandler(handler)
    assert warned == []
    return folder


class _Loaded(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetched = {"img": "src", "script": "src", "iframe": "src", "link": "href"}.get(tag)
        if fetched and given.get(fetched) and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(str(given[fetched]))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        reader = _Loaded()
        reader.feed(page.read_text(encoding="utf-8"))
        assert reader.found
        assert [address for address in reader.found if re.match(r"(https?:)?//", address)] == [], page


def test_reference_names_every_section_and_command(site: Path) -> None:
    configuration = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    for definition in Config.model_json_schema()["$defs"].values():
        for key in definition.get("properties", ()):
            assert f"<code>{key}</code>" in configuration
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        assert f"vipo {name}" in commands, name
