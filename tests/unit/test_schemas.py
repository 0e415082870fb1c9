"""Editors check the files that people edit: every file of configs/ by its schema, and each kind of slip in them."""

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from vipo.cli import app
from vipo.config.compose import load_config, repository_root
from vipo.config.resolved import from_yaml
from vipo.config.schemas import WHOLE, editor_schemas

CONFIGS = repository_root() / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
SCHEMAS = editor_schemas()
# As editors find it: a comment above all keys.
_MODELINE = re.compile(r"\A(#.*\n)*?# yaml-language-server: \$schema=(\S+)\n")


def _errors(name: str, data: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    # The innermost reason: where several may fit, the first is the one without an interpolation.
    return [jsonschema.exceptions.best_match([error]).message for error in validator.iter_errors(data)]


def _leaves(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(value, (*place, key))
    else:
        yield place


def _changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(data)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return changed


def test_the_schemas_are_current(tmp_path: Path) -> None:
    """`make schemas` writes them; they are sound, and none is of a section that is gone."""
    result = CliRunner().invoke(app, ["config", "--schemas", str(tmp_path)])
    assert result.exit_code == 0
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in (CONFIGS / "schema").iterdir()}, "run `make schemas`"
    for text in made.values():
        jsonschema.Draft202012Validator.check_schema(json.loads(text))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_file_names_its_schema_and_keeps_to_it(path: Path) -> None:
    text = path.read_text()
    found = _MODELINE.match(text)
    assert found is not None, "begin it as the files beside it do"
    whole = path.parent == CONFIGS or text.startswith("# @package _global_\n")
    name = WHOLE if whole else path.relative_to(CONFIGS).parts[0]
    assert found[2] == os.path.relpath(CONFIGS / "schema" / f"{name}.json", path.parent)
    data = from_yaml(text)
    assert _errors(name, data) == []
    if name in ("config", "cluster"):
        return
    # A slip at the top, which no file of any section gets past.
    key = next(iter(data))
    assert _errors(name, {f"{key}x": data[key]})


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_and_every_type_of_a_resolved_configuration_is_checked(name: str) -> None:
    """Any part of it is a sound file; the same with one key mistyped, or a mapping for a value, is none."""
    complete = load_config(["experiment=demo", "training.lora.rank=4", "sampling.window.size=4"])
    data = complete.model_dump(mode="json")
    # What a protocol pins is of any section.
    data["protocol"] = {"name": "mine", "version": 1, "pins": {}, "judge": "ocr"}
    data = data if name == WHOLE else data[name]
    assert _errors(name, data) == []
    for place in _leaves(data):
        part: Any = data
        for key in place:
            part = part[key]
        for key in reversed(place):
            part = {key: part}
        assert _errors(name, part) == [], place
        assert _errors(name, _changed(part, place, "${other.key}")) == [], place
        assert _errors(name, _changed(part, place, {"no": "mapping"})), place
        if "arms" not in place[:-1][-2:]:
            mistyped = _changed(part, (*place[:-1], f"{place[-1]}x"), None)
            assert _errors(name, mistyped), place


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config", "defaults:\n  - /setup: demo\n  - override /reward: scene\n  - optional x: ${arm}/y\n  - _self_\n"),
        ("config", "hydra:\n  run: {dir: x}\n"),
        ("config", "experiment:\n  arms: {mine: {base: vipo, seeds: [0], overrides: [+training.lora.rank=4]}}\n"),
        ("config", "training: {updates: '${oc.env:UPDATES}'}\nsampling: ${mine}\n"),
        ("config", "seed: ???\n"),
        ("config", "pretrain: null\n"),
        ("generator", "defaults: [demo]\npath: /data/${name}\n"),
        ("cluster", "train: {memory_mb: 1000}\n"),
        ("optimizer", "learning_rate: 1e-5\n"),
        ("tracking", "trackers: [tensorboard, 'my_trackers:Board']\nsheet_every: null\n"),
    ],
)
def test_what_hydra_composes_is_sound(name: str, text: str) -> None:
    assert _errors(name, from_yaml(text)) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config", "trainning: {updates: 3}\n"),
        ("config", "training: {update: 3}\n"),
        ("config", "experiment: {arms: {mine: {overides: [a=b]}}}\n"),
        ("config", "experiment: {arms: {mine: {overrides: [{a: b}]}}}\n"),
        ("config", "experiment: {arms: {mine: {seeds: [zero]}}}\n"),
        ("config", "defaults: {setup: demo}\n"),
        ("config", "defaults: [{setup: demo, arm: vipo}]\n"),
        ("config", "seed: '0'\n"),
        ("reward", "terms: [{weight: 1.0}]\n"),
        ("reward", "terms: [{name: redness, wieght: 1.0}]\n"),
        ("sampling", "transition: dence\n"),
        ("sampling", "window: {size: 2, mode: slide}\n"),
        ("training", "group_size: 1\n"),
        ("optimizer", "betas: [0.9, 0.95, 0.99]\n"),
        ("generator", "height: $64\n"),
    ],
)
def test_a_slip_is_found(name: str, text: str) -> None:
    assert _errors(name, from_yaml(text))
