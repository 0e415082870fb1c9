"""What `snakemake --config` hands over, lists as they were meant; and when resolved configurations are written."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from snakemake.exceptions import WorkflowError

from vipo.config.compose import dump_config, load_config, repository_root
from vipo.config.validation import ConfigError
from vipo.config.workflow import read_workflow_config


def _handed(text: str) -> Any:
    """As Snakemake hands a value over: YAML where it is, else the text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[training.updates=8,eta=1]", ["training.updates=8", "eta=1"]),
        ("[training.save_at=[2,4],eta=1]", ["training.save_at=[2,4]", "eta=1"]),
        ("[reward.terms=[{name: a, weight: 2}], x=[[1,2]]]", ["reward.terms=[{name: a, weight: 2}]", "x=[[1,2]]"]),
        ('["training.save_at=[2,4]","eta=1"]', ["training.save_at=[2,4]", "eta=1"]),
        ('["training.save_at=[2,4]",training.lora={rank: 4}]', ["training.save_at=[2,4]", "training.lora={rank: 4}"]),
        ("[prompts.source='a,b.txt',x=[]]", ["prompts.source='a,b.txt'", "x=[]"]),
        ("training.updates=8", ["training.updates=8"]),
        ("training.save_at=[2,4]", ["training.save_at=[2,4]"]),
        ("[]", []),
    ],
)  # fmt: skip
def test_overrides_are_read_as_they_are_meant(written: str, meant: list[str]) -> None:
    assert read_workflow_config({"experiment": "flux", "overrides": _handed(written)}) == ("flux", meant)


def test_the_demo_without_overrides_is_the_default() -> None:
    assert read_workflow_config({}) == ("demo", [])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"overides": ["seed=1"]}, "overides: unknown key; did you mean 'overrides'"),
        ({"overrides": "[a=[1,2]"}, r"'\]' is missing"),
        ({"overrides": "[a=[1,2}]"}, "closes nothing"),
        ({"overrides": "[a='b]"}, '"?\'"? is missing'),
        ({"overrides": [["seed=1"]]}, "is no text key=value"),
        ({"overrides": [{"reward": 1}]}, "is no text key=value"),
        ({"overrides": {"seed": 1}}, "is no list"),
        ({"overrides": 8}, "is no list"),
        ({"overrides": "[training.updates=8,seed=1]"}, "'seed=1': has no effect.*experiment.arms.ARM.seeds"),
        ({"overrides": ["+arm=vipo"]}, "'\\+arm=vipo': has no effect"),
    ],
)
def test_anything_else_is_refused_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_workflow_config(given)


RULES = repository_root() / "workflow" / "rules" / "configurations.smk"
CONFIGS = Path("results/demo/configs")


def _read(main: bool = True, **more: Any) -> dict[str, Any]:
    """Read the rules for two runs, as the main process or as a job's."""
    workflow = SimpleNamespace(is_main_process=main)
    runs = {run: load_config(["experiment=demo", "arm=base", f"seed={run[-1]}"]) for run in ("base-s0", "base-s1")}
    given = {"workflow": workflow, "RUNS": runs, "EXPERIMENT_DIR": "results/demo", "Path": Path} | more
    exec(RULES.read_text(), given)
    return given


@pytest.fixture
def another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a running workflow with other overrides has written for the first of the two runs."""
    monkeypatch.chdir(tmp_path)
    text = dump_config(load_config(["experiment=demo", "arm=base", "seed=0", "training.updates=8"]))
    CONFIGS.mkdir(parents=True)
    (CONFIGS / "base-s0.yaml").write_text(text)
    return text


def test_who_reads_the_rules_leaves_alone_what_a_running_workflow_reads(another: str) -> None:
    rules = _read()
    wanted = {run: dump_config(config) for run, config in rules["RUNS"].items()}
    assert (CONFIGS / "base-s0.yaml").read_text() == another
    assert (CONFIGS / "base-s1.yaml").read_text() == wanted["base-s1"]
    # A start that is refused takes back what it has added, and no more.
    rules["remove_added_configurations"]()
    assert [path.name for path in CONFIGS.iterdir()] == ["base-s0.yaml"]
    # One that is not has its own.
    rules["write_configurations"]()
    assert {path.stem: path.read_text() for path in CONFIGS.iterdir()} == wanted
    times = {path: path.stat().st_mtime_ns for path in CONFIGS.iterdir()}
    rules["write_configurations"]()
    assert {path: path.stat().st_mtime_ns for path in CONFIGS.iterdir()} == times


def test_a_jobs_own_snakemake_writes_no_configuration(another: str) -> None:
    _read(main=False)
    assert {path.name: path.read_text() for path in CONFIGS.iterdir()} == {"base-s0.yaml": another}


def test_a_start_without_its_hooks_is_refused(another: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["snakemake", "--no-hooks"])
    # Jobs are started so.
    _read(main=False)
    with pytest.raises(WorkflowError, match="--no-hooks: leaves out what a start begins with"):
        _read(WorkflowError=WorkflowError)
