"""Writes dvc.yaml: the demo's stages as Snakemake plans them, with the configuration files that decide each.

Snakemake stays the one definition: commands, files and runs are those of its dry run. What is added here is which keys
of the tracked configuration files a stage depends on, and which files are metrics and plots.
"""

import logging
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from snakemake.api import ConfigSettings, DAGSettings, OutputSettings, ResourceSettings, SnakemakeApi
from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.common import LogEvent

from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config

EXPERIMENT = "demo"
TARGET = "dvc.yaml"
HEADER = "# Written by `make dvc-yaml` from the Snakefile and configs/; a test fails where it is not current.\n"

_LEARNING = (
    *("generator", "prompts", "reward", "perception", "sampling"),
    *("credit", "advantages", "objective", "optimizer", "training"),
)

#: Sections of the configuration that a stage's result depends on. The page and the crate are no stages here: they show
#: times and records of one machine.
READ: dict[str, tuple[str, ...]] = {
    "prepare": ("prompts",),
    "encode": ("generator", "training"),
    "train": _LEARNING,
    "credit": _LEARNING,
    "sample": ("generator", "sampling", "training", "evaluation"),
    # The terms that are trained on are scored too, whether section `evaluation` names them or not.
    "score": ("generator", "reward", "perception", "sampling", "training", "evaluation"),
    "summarize": ("experiment", "reward", "evaluation"),
    "compare": ("experiment", "reward", "evaluation"),
}
CURVES = {"object redness": "reward/object_redness", "shape": "reward/scene_shape", "change": "change/total"}


class Planned(logging.Handler):
    """Collects the jobs that a dry run tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a job's rule, files and command."""
        if getattr(record, "event", None) == LogEvent.JOB_INFO:
            self.jobs.append(vars(record))


def planned_jobs() -> list[dict[str, Any]]:
    """All jobs of the experiment, whatever is done already: ``rule_name``, ``input``, ``output``, ``shellcmd``.

    DVC runs one stage after another, so a run's samples and scores are a stage each, whatever ``cluster.shares`` says.
    """
    planned = Planned()
    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=1),
            config_settings=ConfigSettings(config={"experiment": EXPERIMENT, "overrides": ["cluster.shares=1"]}),
            snakefile=Path("Snakefile"),
        )
        dag = workflow.dag(dag_settings=DAGSettings(forceall=True))
        logging.getLogger("snakemake.logging").addHandler(planned)
        dag.execute_workflow(executor="dryrun")
    return planned.jobs


@cache
def run_config(arm: str, seed: str) -> Config:
    """The configuration of a run as the tracked files have it."""
    return load_config([f"experiment={EXPERIMENT}", f"arm={arm}", f"seed={seed}"])


def pipeline(root: Path) -> dict[str, Any]:
    """The content of dvc.yaml. `root` is the repository and the working directory."""
    stages: dict[str, Any] = {}
    metrics = []
    order = list(READ)
    jobs = [job for job in planned_jobs() if job["rule_name"] in READ]
    for job in sorted(jobs, key=lambda job: (order.index(job["rule_name"]), job["shellcmd"])):
        rule, (words, file) = job["rule_name"], _command(job["shellcmd"])
        # The file itself may be of an earlier start with overrides.
        arm, _, seed = Path(file).stem.rpartition("-s")
        config = run_config(arm, seed)
        # Derived from the tracked files, which are named as parameters.
        deps = [_relative(path, root) for path in job["input"] if path != file]
        # DVC would delete what does not persist before the stage starts, in its cache or not: the stages themselves
        # replace their files whole, and set aside what another configuration made.
        outs = [{path: {"persist": True}} for path in job["output"]]
        run = job["wildcards"].get("run")
        if run is not None:
            # Weights of earlier updates outlive a killed job, so that a resume need not make them again. Snakemake
            # would delete what it knows of.
            kept = f"results/{EXPERIMENT}/runs/{run}/updates"
            if rule == "train":
                outs.append({kept: {"persist": True}})
            elif rule == "sample" and not config.is_base:
                deps.append(kept)
        metrics += [path for path in job["output"] if Path(path).name == "summary.json"]
        of = run or job["wildcards"].get("checkpoint")
        stages[rule if of is None else f"{rule}-{of}"] = {
            "cmd": f"vipo {words} experiment={EXPERIMENT} arm={config.arm} seed={config.seed}",
            "deps": sorted(deps),
            "params": list(_parameters(rule, config, root)),
            "outs": outs,
        }
    data = f"results/{EXPERIMENT}/report/data"
    curves = [
        {f"held-out {name}": {"template": "arms", "x": "update", "y": {f"{data}/tables/curves.csv": column}}}
        for name, column in CURVES.items()
    ]
    return {"stages": stages, "metrics": metrics, "plots": [*curves, f"{data}/figures"]}


def _command(shell: str) -> tuple[str, str]:
    """Command and file of ``… vipo COMMAND --config FILE …``; what starts it is Snakemake's own matter."""
    words = shlex.split(shell)
    if "vipo" not in words or "--config" not in words[(start := words.index("vipo")) :]:
        raise ValueError(f"{shell!r}: a rule that DVC runs as well is 'vipo COMMAND --config FILE'")
    end = words.index("--config", start)
    return shlex.join(words[start + 1 : end]), words[end + 1]


def _relative(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix() if Path(path).is_absolute() else path


def _parameters(stage: str, config: Config, root: Path) -> Iterator[Any]:
    """The tracked files that a run's configuration is composed of, each with the keys that decide the stage."""
    arms, meter = config.experiment.arms, config.experiment.meter
    arm = arms[config.arm].base or config.arm
    measured = () if stage != "credit" or meter is None else meter.arms
    with initialize_config_dir(str(root / "configs"), version_base="1.3"):
        composed = compose("config", [f"experiment={EXPERIMENT}", f"arm={arm}"], return_hydra_config=True)
    choices = {group: name for group, name in composed.hydra.runtime.choices.items() if not group.startswith("hydra")}
    yield {"configs/config.yaml": ["defaults"]}
    for path in sorted({f"configs/arm/{arms[name].base or name}.yaml" for name in measured}):
        if (root / path).is_file():
            yield {path: None}
    for group, name in sorted(choices.items()):
        path = f"configs/{group}/{name}.yaml"
        # An optional default is a choice even where it has no file.
        if not (root / path).is_file():
            continue
        text = (root / path).read_text()
        if group == "arm":
            if stage in ("train", "sample", "score"):
                yield {path: None}
        elif text.startswith("# @package _global_"):
            keys = [key for key in yaml.safe_load(text) if key in ("defaults", *READ[stage])]
            # An arm's overrides may hold keys of both; the Snakefile refuses those of what all arms share.
            if group == "experiment" and stage in ("train", "sample", "score"):
                keys.append(f"experiment.arms.{config.arm}")
            if group == "experiment" and measured:
                keys += ["experiment.meter", *(f"experiment.arms.{name}" for name in measured)]
            if keys:
                yield {path: keys}
        elif group in READ[stage]:
            yield {path: None}


def main() -> None:
    """Write dvc.yaml into the repository's root, which is the working directory."""
    root = repository_root()
    Path(TARGET).write_text(HEADER + yaml.safe_dump(pipeline(root), sort_keys=False, width=120))


if __name__ == "__main__":
    main()
