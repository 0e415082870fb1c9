"""The computed tables of docs/ are those of their figures, and a row is counted from configurations alone."""

import json
from pathlib import Path

from benchmarks import setup_table
from benchmarks.plan_table import GENERATORS, MODES, table, write_checkpoint
from vipo.config.compose import load_generator_sections, repository_root
from vipo.generators.configured import resolve_class

ROOT = repository_root()
FIGURES = json.loads((ROOT / "benchmarks/plan.json").read_text())


def test_the_page_shows_the_figures() -> None:
    assert f"\n{table(FIGURES)}\n" in (ROOT / "docs/generators.md").read_text()
    assert all(each["generator"] in GENERATORS and each["mode"] in MODES for each in FIGURES)


def test_the_setups_on_their_page_are_what_is_planned_today() -> None:
    """One cell of all, for each takes seconds: sharded, for there most is counted."""
    cells = json.loads((ROOT / "benchmarks/setups.json").read_text())
    assert f"\n{setup_table.table(cells)}\n" in (ROOT / "docs/hardware.md").read_text()
    shown = {(each["setup"], each["hardware"].removesuffix("_lora")): each for each in cells}
    assert shown.keys() == {(setup, name) for setup in setup_table.SETUPS for name in setup_table.HARDWARE}
    assert setup_table.cell("sd35_medium", "8x80gb") == shown["sd35_medium", "8x80gb"]


def test_every_generator_of_the_table_is_one_that_its_adapter_takes(tmp_path: Path) -> None:
    named = {path.stem for path in (ROOT / "configs/generator").glob("*.yaml")}
    assert named - {"demo"} >= GENERATORS.keys()
    for name in GENERATORS:
        folder = tmp_path / name
        folder.mkdir()
        write_checkpoint(name, folder)
        generator, _ = load_generator_sections([f"generator={name}", f"generator.path={folder}"])
        resolve_class(generator).check(generator, ROOT)
