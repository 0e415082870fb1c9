"""The commands of the README and of docs/steps.md are the ones that exist; the cheap ones are run."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from PIL import Image

from vipo.cli import app
from vipo.config.compose import load_config, repository_root

ROOT = repository_root()
STEPS = "".join((ROOT / page).read_text() for page in ("README.md", "docs/steps.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
TEXTS = STEPS + "".join((ROOT / name).read_text() for name in ("docs/evaluation.md", "data/README.md"))
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^vipo .*$", TEXTS, re.MULTILINE)]


def test_commands_are_documented() -> None:
    assert {command[1] for command in COMMANDS} >= {"map", "config", "train", "evaluate", "base"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_parses_and_its_configuration_validates(command: list[str]) -> None:
    group = typer.main.get_command(app)
    with group.make_context("vipo", command[1:]) as context:
        name, subcommand, rest = group.resolve_command(context, command[1:])  # type: ignore[attr-defined]
    assert name == command[1]
    with subcommand.make_context(name, rest) as parsed:
        overrides = parsed.params.get("overrides")
    if overrides:
        (named,) = (value.removeprefix("experiment=") for value in overrides if value.startswith("experiment="))
        assert load_config(list(overrides)).experiment.name == named


def _fenced(page: Path, program: str = "vipo [a-z]") -> list[str]:
    """Commands of a program in a page's code blocks, as a shell would have them."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").replace("experiment=NAME", "experiment=demo").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r" && | \| ", line)]
    return [part for part in parts if re.match(program, part)]


def test_commands_of_every_page_parse_and_their_configurations_validate() -> None:
    """Those of some pages are run, by tests of their own."""
    group, found, read = typer.main.get_command(app), 0, set[tuple[str, ...]]()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for line in _fenced(page):
            command = shlex.split(line, comments=True)
            with group.make_context("vipo", command[1:]) as context:
                name, subcommand, rest = group.resolve_command(context, command[1:])  # type: ignore[attr-defined]
            with subcommand.make_context(name, rest) as parsed:
                overrides = tuple(parsed.params.get("overrides") or ())
            found += 1
            # Placeholders, and experiments of a page's own.
            composed = any(override.startswith("experiment=") for override in overrides)
            if composed and not re.search(r"=(\.\.\.|mine)|[A-Z]{4}|mysite", line) and overrides not in read:
                read.add(overrides)
                load_config(list(overrides))
    assert found > 100


def test_other_commands_of_every_page_name_what_is_there() -> None:
    """Targets of the Makefile, experiments and profiles of the workflow, modules of the benchmarks."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = {"make": 0, "snakemake": 0, "python": 0}
    for page in [*(ROOT / name for name in PAGES), *sorted((ROOT / "docs").rglob("*.md"))]:
        for line in _fenced(page, "(make|snakemake|python) [a-z-]"):
            program, *arguments = shlex.split(line, comments=True)
            found[program] += 1
            if program == "make":
                assert arguments[0] in targets, f"{page.name}: {line}"
            elif program == "snakemake":
                for name in re.findall(r"experiment=(\w+)", line.partition(" overrides")[0]):
                    # The reader's own.
                    assert name == "mine" or (ROOT / f"configs/experiment/{name}.yaml").is_file(), line
                for name in re.findall(r"--profile (\S+)", line):
                    assert (ROOT / name / "config.yaml").is_file(), line
            elif arguments[0] == "-m" and arguments[1].startswith("benchmarks"):
                assert (ROOT / f"{arguments[1].replace('.', '/')}.py").is_file(), line
    assert min(found.values()) >= 4, found


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    named = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]+)"', text))


def test_headings_that_the_readme_points_to_exist() -> None:
    """The site's build looks at its own pages alone."""
    linked = [
        (page, target, anchor)
        for page in (ROOT / name for name in PAGES)
        for target, anchor in re.findall(r"\]\((?!\w+:)([\w./-]+)#([\w-]+)\)", page.read_text())
    ]
    assert len(linked) >= 2
    for page, target, anchor in linked:
        assert anchor in _anchors(page.parent / target), f"{page.name}: {target}#{anchor}"


TABLE = re.compile(r"^\|.*\n\|[-: |]+\|$", re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_a_page_shows_an_example_before_its_first_table(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    if table := TABLE.search(text):
        assert "```" in text[: table.start()]


def test_the_readme_is_three_lines_a_picture_two_commands_one_table_then_links() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    title, lines, picture, heading = (part.strip() for part in text.split("\n\n")[:4])
    assert title == "# vipo"
    assert len(lines.splitlines()) <= 3
    assert picture.startswith("![")
    assert heading.startswith("## Two commands")
    assert len(TABLE.findall(text)) == 1
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Two commands", "What the demo shows", "Where to go"]


def test_map_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = next(c for c in COMMANDS if c[1] == "map")
    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((320, 240), (-2, -1.2, 1, 1.2), 50).convert("RGB").save("photo.jpg")
    app(command[1:], standalone_mode=False)
    with Image.open("overlay.png") as picture:
        assert picture.width > 320


@pytest.mark.parametrize("page", [*PAGES, *sorted(path.name for path in (ROOT / "docs").glob("*.md"))])
def test_files_that_a_page_names_exist(page: str) -> None:
    path = ROOT / page if page in PAGES else ROOT / "docs" / page
    for target in re.findall(r"\]\((?!\w+:)([\w./-]+)[)#]", path.read_text()):
        assert (path.parent / target).exists(), target
