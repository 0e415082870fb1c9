"""The house: imports between its rooms point one way, and what is at the bottom knows nothing of what is above."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import defaultdict

import pytest

from vipo.config.compose import repository_root

PACKAGE = repository_root() / "vipo"


def _rooms() -> dict[str, set[str]]:
    """Of each room or file of the package, the others that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            parts = (name.split(".") for name in names)
            found[room] |= {other[1] for other in parts if other[0] == "vipo" and len(other) > 1 and other[1] != room}
    return found


def test_imports_between_rooms_point_one_way() -> None:
    rooms = _rooms()
    order = list(graphlib.TopologicalSorter(rooms).static_order())
    assert len(order) > 15
    assert {"training", "generators"} <= rooms.keys()


def test_the_lower_rooms_know_nothing_of_the_upper_ones() -> None:
    rooms = _rooms()
    above = {"training", "evaluation", "reporting", "audit", "stages", "commands", "cli"}
    for room in ("config", "generators", "perception", "prompts", "provenance", "rewards"):
        assert not rooms[room] & (above | {"credit", "objectives", "sampling"}), room
    for room in ("credit", "objectives", "sampling"):
        assert not rooms[room] & above, room


def test_the_page_has_each_room_once_and_every_import_points_down_it() -> None:
    page = (repository_root() / "docs/design.md").read_text(encoding="utf-8")
    heads = re.findall(r"^\*\*(`.+?)\.\*\*", page, re.MULTILINE)
    named = [(name, place) for place, head in enumerate(heads) for name in re.findall(r"`(\w+)(?:/|\.py)`", head)]
    places, rooms = dict(named), _rooms()
    assert sorted(name for name, _ in named) == sorted(
        path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py") and path.name[0] != "_"
    )
    up = [
        (room, other)
        for room, others in rooms.items()
        if room in places
        for other in others - {"__init__"}
        if places[other] < places[room]
    ]
    assert up == []


def test_other_people_s_loops_get_credit_and_rewards_without_the_trainer_and_hydra() -> None:
    """As a process of its own has it; here others have imported both."""
    code = (
        "import sys, vipo.credit.contrast, vipo.rewards; "
        "print(sorted({'hydra', 'omegaconf', 'vipo.training'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("room", ["commands", "stages", "training"])
def test_no_file_is_too_long_to_read(room: str) -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (PACKAGE / room).glob("*.py")}
    assert max(lengths.values()) <= 300, lengths


def test_the_loop_of_training_is_short() -> None:
    assert len((PACKAGE / "training/run.py").read_text(encoding="utf-8").splitlines()) <= 150
