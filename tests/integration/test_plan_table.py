"""The table of docs/generators.md is that of its figures, and a row is counted from configurations alone."""

import json
from pathlib import Path

from benchmarks.plan_table import GENERATORS, MODES, table, write_checkpoint
from vipo.config.compose import load_generator_sections, repository_root
from vipo.generators.configured import resolve_class

ROOT = repository_root()
FIGURES = json.loads((ROOT / "benchmarks/plan.json").read_text())


def test_the_page_shows_the_figures() -> None:
    assert f"\n{table(FIGURES)}\n" in (ROOT / "docs/generators.md").read_text()
    assert all(each["generator"] in GENERATORS and each["mode"] in MODES for each in FIGURES)


def test_every_generator_of_the_table_is_one_that_its_adapter_takes(tmp_path: Path) -> None:
    named = {path.stem for path in (ROOT / "configs/generator").glob("*.yaml")}
    assert named - {"demo"} >= GENERATORS.keys()
    for name in GENERATORS:
        folder = tmp_path / name
        folder.mkdir()
        write_checkpoint(name, folder)
        generator, _ = load_generator_sections([f"generator={name}", f"generator.path={folder}"])
        resolve_class(generator).check(generator, ROOT)
