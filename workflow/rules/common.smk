"""Configurations of all runs, resolved and written (only when changed) before any rule runs."""

import json
from pathlib import Path

from snakemake.exceptions import WorkflowError

from vipo.config.compose import (
    ConfigError,
    dump_config,
    load_config,
    repository_root,
    write_if_changed,
)

ROOT = repository_root()
EXPERIMENT = str(config.get("experiment", "demo"))
OVERRIDES = [str(item) for item in config.get("overrides", [])]


def resolve_runs():
    """The validated configuration of every run of the experiment, by run name."""
    chosen = [f"experiment={EXPERIMENT}", *OVERRIDES]
    try:
        arms = load_config(chosen).experiment.arms
        return {
            resolved.run_name: resolved
            for arm, settings in arms.items()
            for seed in settings.seeds
            for resolved in [load_config([*chosen, f"arm={arm}", f"seed={seed}"])]
        }
    except ConfigError as error:
        raise WorkflowError(f"experiment {EXPERIMENT}: {error}") from error


RUNS = resolve_runs()
FIRST = next(iter(RUNS))
for name in ("prompts", "embeddings"):
    if (
        len(
            {
                json.dumps(getattr(resolved, f"{name}_identity")(), sort_keys=True)
                for resolved in RUNS.values()
            }
        )
        > 1
    ):
        raise WorkflowError(
            f"experiment {EXPERIMENT}: an arm's overrides change its {name}; all arms share one set"
        )
TRAINED = [run for run, resolved in RUNS.items() if not resolved.is_base]
EXPERIMENT_DIR = f"results/{RUNS[FIRST].experiment.name}"

for run, resolved in RUNS.items():
    write_if_changed(
        Path(EXPERIMENT_DIR, "configs", f"{run}.yaml"), dump_config(resolved)
    )


wildcard_constraints:
    run="|".join(RUNS),


def config_file(run):
    """The resolved file of a run; its time stamp triggers nothing, the sections in `params` do."""
    return ancient(f"{EXPERIMENT_DIR}/configs/{run}.yaml")


def identity(run, stage):
    """What of a run's configuration decides a stage's result, as text. A change reruns what reads it, a comment does not."""
    return json.dumps(getattr(RUNS[run], f"{stage}_identity")(), sort_keys=True)


def generator_files():
    """The files of a local generator; none for a hub id, whose revision pins it."""
    folder = ROOT / RUNS[FIRST].generator.path
    return sorted(
        str(path)
        for kind in ("safetensors", "json")
        for path in folder.rglob(f"*.{kind}")
    )


def backbone_files(run):
    """Local weights of the backbone, where the configuration names some."""
    weights = RUNS[run].perception.weights
    path = ROOT / weights if weights else None
    return (
        []
        if path is None
        else (
            [str(path)]
            if path.is_file()
            else sorted(map(str, path.rglob("*.safetensors")))
        )
    )


def prompt_files():
    """The prompt source where it is a file; a callable source has none."""
    source = ROOT / RUNS[FIRST].prompts.source
    return [str(source)] if source.is_file() else []


def finished_run(wildcards):
    """The finished run that an evaluation reads; the base arm has none."""
    if RUNS[wildcards.run].is_base:
        return []
    run = f"{EXPERIMENT_DIR}/runs/{wildcards.run}"
    return [f"{run}/config.yaml", f"{run}/weights"]
