"""The command line's contract: help, configuration and its errors, exit statuses."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest
import yaml

import vipo as package
from vipo.config.compose import repository_root
from vipo.errors import VipoError

if TYPE_CHECKING:
    from command import Command

# Loaded as a plugin, its assertions explain themselves.
pytest_plugins = ["command"]

ROOT = repository_root()
DEMO = "experiment=demo"
PURPOSE = {
    "config": "resolved, validated configuration",
    "prepare": "Clean, deduplicate and split the prompts",
    "encode": "Encode the prepared prompts",
    "train": "Train one run",
    "evaluate": "held-out prompts",
    "sample": "with the base and with a run's trained weights",
    "summarize": "numbers, tables and figures",
    "report": "HTML report",
    "crate": "RO-Crate",
    "audit": "Check results",
    "map": "allocation map over any picture",
    "base": "Rebuild the demo generator",
    "diff": "what differs between two runs",
    "export": "folder that is ready for the Hub",
}
# Imports nothing but the command line, runs it and tells whether torch came along.
WATCHED = """
import sys
from vipo.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_help_lists_every_command(vipo: Command) -> None:
    shown = vipo("--help")
    assert shown.code == 0
    assert "Post-train image generators" in shown.out
    listed = {
        line.split()[1] for line in shown.out.splitlines() if line.startswith("│ ") and not line.startswith("│ -")
    }
    assert set(PURPOSE) <= listed


@pytest.mark.parametrize("command", PURPOSE)
def test_help_of_a_command_tells_its_purpose(vipo: Command, command: str) -> None:
    shown = vipo(command, "--help")
    assert shown.code == 0
    assert PURPOSE[command] in " ".join(shown.out.split())
    assert f"Usage: vipo {command}" in shown.out


@pytest.mark.parametrize("arguments", [["tarin"], ["train", "--experiment", "demo"], ["map"]])
def test_unknown_commands_and_options_are_usage_errors(vipo: Command, arguments: list[str]) -> None:
    shown = vipo(*arguments)
    assert shown.code == 2
    assert "Usage: vipo" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["config", DEMO], 0),
        (["config", DEMO, "reward.terms=[{name: rednes}]"], 1),
    ],
)
def test_help_and_config_import_no_torch(arguments: list[str], code: int) -> None:
    finished = subprocess.run([sys.executable, "-c", WATCHED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == code, finished.stderr
    assert finished.stderr.splitlines()[-1] == "False"


def test_installed_command_exits_1_with_the_error_alone_on_stderr() -> None:
    command = Path(sys.executable).with_name("vipo")
    finished = subprocess.run([command, "config", DEMO, "sampling.stesp=3"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == (
        "error: sampling.stesp: unknown key; did you mean 'steps'? "
        "allowed: eta, ode, same_initial_noise, shift, steps, transition, window\n"
    )


def test_schema_is_valid_and_accepts_the_demo(vipo: Command) -> None:
    schema = json.loads(vipo("config", "--schema").out)
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    resolved = yaml.safe_load(vipo("config", DEMO).out)
    validator(schema).validate(resolved)
    resolved["sampling"]["stesp"] = 3
    with pytest.raises(jsonschema.ValidationError, match="stesp"):
        validator(schema).validate(resolved)


def test_a_resolved_file_stands_for_its_overrides(vipo: Command, tmp_path: Path) -> None:
    resolved = tmp_path / "run.yaml"
    resolved.write_text(vipo("config", DEMO, "prompts.eval_share=0.5").out)
    assert vipo("prepare", "--config", resolved, "--results", tmp_path / "file").code == 0
    assert vipo("prepare", DEMO, "prompts.eval_share=0.5", "--results", tmp_path / "overrides").code == 0
    written = [
        {
            name: (tmp_path / kind / "demo/prompts" / name).read_bytes()
            for name in ("train.jsonl", "eval.jsonl", "manifest.json")
        }
        for kind in ("file", "overrides")
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        # Unknown choices.
        (["experiment=demi"], ["experiment/demi", "demo"]),
        ([DEMO, "arm=vpio"], ["arm/vpio", "backbone_sam", "uniform vipo"]),
        ([DEMO, "reward=nope"], ["reward/nope", "object_redness"]),
        ([DEMO, "reward.terms=[{name: rednes}]"], ["reward.terms.0.name", "did you mean 'redness'", "scene"]),
        ([DEMO, "evaluation.rewards=[scen]"], ["evaluation.rewards", "'scen'", "did you mean 'scene'"]),
        ([], ["experiment=", "demo"]),
        # Unknown keys.
        ([DEMO, "nope=1"], ["nope: unknown key", "allowed: advantages, alarms, arm, cluster"]),
        ([DEMO, "optimizer.learnin_rate=1"], ["optimizer.learnin_rate", "did you mean 'learning_rate'"]),
        # Wrong types.
        ([DEMO, "optimizer.learning_rate=fast"], ["optimizer.learning_rate", "'fast'", "number"]),
        ([DEMO, "training.updates="], ["training.updates", "''", "integer"]),
        ([DEMO, "training.updates=1.5"], ["training.updates", "1.5"]),
        ([DEMO, "seed=true"], ["seed", "True"]),
        ([DEMO, "experiment.arms=3"], ["experiment.arms", "3"]),
        ([DEMO, "experiment.arms.vipo=3"], ["experiment.arms.vipo", "3"]),
        ([DEMO, "training=3"], ["training=3", "group"]),
        ([DEMO, "generator.device=gpu"], ["generator.device", "'gpu'", "cuda"]),
        # Impossible combinations.
        ([DEMO, "training.group_size=1"], ["training.group_size", "1", "2"]),
        ([DEMO, "training.trained_transitions=10"], ["training.trained_transitions 10", "sampling.steps 10"]),
        ([DEMO, "objective.ratio=sample"], ["objective.ratio 'sample'", "credit.sources (backbone)"]),
        ([DEMO, "training.micro_batch=7"], ["micro_batch 7"]),
        # No override at all.
        ([DEMO, "garbage"], ["'garbage'", "key=value"]),
        ([DEMO, "training={"], ["'training={'", "key=value"]),
        ([DEMO, "generator.path=${nowhere}"], ["nowhere"]),
    ],
)  # fmt: skip
def test_bad_configuration_is_one_readable_message(vipo: Command, arguments: list[str], told: list[str]) -> None:
    shown = vipo("config", *arguments)
    shown.refuses(*told)
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert "pydantic" not in shown.err
    assert "hydra" not in shown.err.lower()


def test_every_problem_has_its_line(vipo: Command) -> None:
    shown = vipo("config", DEMO, "seed=-1", "optimizer.betas=[0.9]", "sampling.eta=0")
    shown.refuses("seed: ", "optimizer.betas", "sampling.eta: ")
    assert len(shown.err.splitlines()) == 3


def test_configuration_files_that_cannot_be_used(vipo: Command, tmp_path: Path) -> None:
    shown = vipo("config", DEMO).out
    files = {
        "absent.yaml": (None, "No such file"),
        "cut.yaml": (shown[: shown.index("generator:")].encode(), "generator: missing"),
        "list.yaml": (b"- a\n- b\n", "mapping"),
        "broken.yaml": (b"a: [1\n", "YAML"),
        "binary.yaml": (bytes(range(256)), "binary.yaml"),
        "typo.yaml": (shown.replace("shift:", "shfit:", 1).encode(), "did you mean 'shift'"),
    }
    for name, (content, told) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        vipo("train", "--config", tmp_path / name, "--results", tmp_path / "results").refuses(name, told)
    vipo("train", DEMO, "--config", tmp_path / "typo.yaml").refuses("not both", "typo.yaml")
    assert not (tmp_path / "results").exists()


def test_base_needs_a_section_that_says_what_to_build(vipo: Command, tmp_path: Path) -> None:
    resolved = "no section 'pretrain'"
    vipo("base", DEMO, "~pretrain", "--output", tmp_path / "base").refuses(resolved)
    assert not (tmp_path / "base").exists()


def test_every_error_of_the_package_is_one_that_the_command_line_prints() -> None:
    found = []
    # What is served elsewhere runs without vipo, and a library that is in no lock may be absent.
    apart = re.compile(r".*\.(served\b.*|eight_bit)")
    modules = [each for each in pkgutil.walk_packages(package.__path__, "vipo.") if not apart.fullmatch(each.name)]
    for module in modules:
        for name, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(value, Exception) and value.__module__.startswith("vipo."):
                assert issubclass(value, VipoError), f"{value.__module__}.{name}"
                found.append(name)
    expected = {"PromptError", "RewardError", "PerceptionError", "GeneratorError", "TrainingError", "EvaluationError"}
    expected |= {"StorageError", "CheckpointError", "ProvenanceError", "RunLocked", "TrackingError", "ConfigError"}
    assert expected | {"ReportError", "Preempted"} <= set(found)
