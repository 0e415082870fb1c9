"""Configurations of all runs, resolved and written (only when changed) before any rule runs."""

import json
import os
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from vipo.config.cluster import job_resources
from vipo.config.compose import (
    dump_config,
    load_config,
    repository_root,
    write_if_changed,
)
from vipo.config.experiment import check_runs
from vipo.config.meter import measured_weights, measurement_label
from vipo.config.validation import ConfigError
from vipo.config.workflow import read_workflow_config
from vipo.errors import VipoError
from vipo.imports import check_imports
from vipo.provenance.files import file_sha256
from vipo.provenance.lineage import PROVENANCE
from vipo.text import message

ROOT = repository_root()
try:
    EXPERIMENT, OVERRIDES = read_workflow_config(config)
except ConfigError as error:
    raise WorkflowError(str(error)) from error

# What all stages' shells share. A stage waits for another process that writes the same files, such as a predecessor on
# its last checkpoint. A scheduler's signal reaches every process of a job: the shell outlives the stage, which writes
# its checkpoint meanwhile.
shell.prefix("set -euo pipefail; export VIPO_WAIT=1200; trap : TERM USR1; ")


def resolve_runs():
    """The validated configuration of every run of the experiment, by run name."""
    chosen = [f"experiment={EXPERIMENT}", *OVERRIDES]
    try:
        arms = load_config(chosen).experiment.arms
        runs = {
            resolved.run_name: resolved
            for arm, settings in arms.items()
            for seed in settings.seeds
            for resolved in [load_config([*chosen, f"arm={arm}", f"seed={seed}"])]
        }
        check_runs(runs)
        return runs
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
for run, resolved in RUNS.items():
    if job_resources(resolved, "train") != job_resources(RUNS[FIRST], "train"):
        raise WorkflowError(
            f"experiment {EXPERIMENT}: run {run} changes its cluster, distribution, device or threads; all runs share one"
        )
TRAINED = [run for run, resolved in RUNS.items() if not resolved.is_base]
EXPERIMENT_DIR = f"results/{RUNS[FIRST].experiment.name}"
# What the arms' credit is worth, where the experiment asks for it (credit.smk).
METER = RUNS[FIRST].experiment.meter
MEASURED = [
    f"{EXPERIMENT_DIR}/credit/{measurement_label(name)}/credit.json"
    for name in (METER.checkpoints if METER else ())
]

# What stood there before, for a start that is refused.
EARLIER = {}
for run, resolved in RUNS.items():
    file = Path(EXPERIMENT_DIR, "configs", f"{run}.yaml")
    EARLIER[file] = file.read_bytes() if file.is_file() else None
    write_if_changed(file, dump_config(resolved))


def restore_configurations():
    """Put the configurations back that were there before this file was read."""
    for file, content in EARLIER.items():
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)


try:
    for resolved in RUNS.values():
        check_imports(resolved)
except VipoError as error:
    raise WorkflowError(f"experiment {EXPERIMENT}: {message(str(error))}") from error


wildcard_constraints:
    run="|".join(RUNS),


def config_file(run):
    """The resolved file of a run; its time stamp triggers nothing, the sections in `params` do."""
    return ancient(f"{EXPERIMENT_DIR}/configs/{run}.yaml")


def identity(run, stage):
    """What of a run's configuration decides a stage's result, as text. A change reruns what reads it, a comment does not."""
    return json.dumps(getattr(RUNS[run], f"{stage}_identity")(), sort_keys=True)


def as_input(path):
    """A file as rules name it: relative where it is in the repository, so that a checkout can be moved."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def generator_files():
    """The files of a local generator, but for the record of its making; none for a hub id, whose revision pins it."""
    folder = ROOT / RUNS[FIRST].generator.path
    return sorted(
        as_input(path)
        for kind in ("safetensors", "json")
        for path in folder.rglob(f"*.{kind}")
        if path != folder / PROVENANCE
    )


def backbone_files(run):
    """Local weights of the backbone, where the configuration names some."""
    weights = RUNS[run].perception.weights
    path = ROOT / weights if weights else None
    return (
        []
        if path is None
        else (
            [as_input(path)]
            if path.is_file()
            else sorted(map(as_input, path.rglob("*.safetensors")))
        )
    )


def prompt_files():
    """The prompt source where it is a file; a callable source has none."""
    source = ROOT / RUNS[FIRST].prompts.source
    return [as_input(source)] if source.is_file() else []


def finished_run(wildcards):
    """The finished run that an evaluation reads; the base arm has none."""
    if RUNS[wildcards.run].is_base:
        return []
    run = f"{EXPERIMENT_DIR}/runs/{wildcards.run}"
    return [f"{run}/config.yaml", f"{run}/weights"]


def export_image_digest(image):
    """The image's SHA-256 for provenance: no image holds its own. Jobs inherit it, so that it is read once."""
    variable = "APPTAINERENV_VIPO_IMAGE_DIGEST"
    if workflow.is_main_process or variable not in os.environ:
        if not Path(image).is_file():
            raise WorkflowError(f"{image}: is missing; `make sif` builds it")
        os.environ[variable] = f"sha256:{file_sha256(Path(image))}"
