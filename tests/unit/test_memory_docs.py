"""What docs/memory.md tells people to type is composed as it stands, and its benchmark runs in its smallest size."""

import shlex
from pathlib import Path

from benchmarks.embeddings import measure
from vipo.config.compose import load_config, repository_root


def test_commands_compose() -> None:
    page = (repository_root() / "docs/memory.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in page.split("```")[1].strip().splitlines()]
    assert len(commands) == 6
    names = set()
    for vipo, stage, *overrides in commands:
        assert vipo == "vipo"
        assert stage in ("train", "encode")
        names.add(load_config(overrides).optimizer.name)
    assert names == {"adamw", "adamw_8bit", "normalised"}


def test_the_benchmark_measures_every_column(tmp_path: Path) -> None:
    cells = measure(1030, tmp_path)
    assert cells[:2] == ["1,030", "4"]
    assert len(cells) == 9
