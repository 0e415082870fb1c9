"""Configurations of all runs, resolved before any rule runs, and what rules read of them."""

import json
import os
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from vipo.config.cluster import job_resources
from vipo.config.compose import load_config, repository_root
from vipo.config.experiment import check_runs
from vipo.config.meter import measured_weights, measurement_label
from vipo.config.validation import ConfigError
from vipo.config.workflow import read_workflow_config
from vipo.errors import VipoError
from vipo.imports import check_imports
from vipo.provenance.files import file_sha256
from vipo.provenance.records import checkpoint_files
from vipo.provenance.reward_files import local_files
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
drawn = {
    json.dumps(resolved.as_base().sampling_identity(), sort_keys=True)
    for resolved in RUNS.values()
}
if len(drawn) > 1:
    raise WorkflowError(
        f"experiment {EXPERIMENT}: an arm's overrides change how samples are drawn (generator, evaluation, "
        "sampling.shift or training.threads); all arms are compared with one base, sampled once"
    )
for run, resolved in RUNS.items():
    if job_resources(resolved, "train") != job_resources(RUNS[FIRST], "train"):
        raise WorkflowError(
            f"experiment {EXPERIMENT}: run {run} changes its cluster, distribution, device or threads; all runs share one"
        )
# What every run is compared with, sampled once.
BASE = RUNS[FIRST].as_base().run_name
SHARES = RUNS[FIRST].cluster.shares
TRAINED = [run for run, resolved in RUNS.items() if not resolved.is_base]
EXPERIMENT_DIR = f"results/{RUNS[FIRST].experiment.name}"
# What the arms' credit is worth, where the experiment asks for it (credit.smk).
METER = RUNS[FIRST].experiment.meter
MEASURED = [
    f"{EXPERIMENT_DIR}/credit/{measurement_label(name)}/credit.json"
    for name in (METER.checkpoints if METER else ())
]

try:
    for resolved in RUNS.values():
        check_imports(resolved)
except VipoError as error:
    raise WorkflowError(f"experiment {EXPERIMENT}: {message(str(error))}") from error


wildcard_constraints:
    run="|".join(map(re.escape, RUNS)),
    share=r"\d+",


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
    """The files of a local generator, but for the record of its making; none for a hub id, whose revision pins it.

    And what it starts from: a file, or the weights of a run.
    """
    generator = RUNS[FIRST].generator
    folder = ROOT / generator.path
    beside = [
        ROOT / name
        for name in (generator.file, generator.file_2, generator.start)
        if name
    ]
    folders = [
        folder,
        *(path / "weights" if (path / "weights").is_dir() else path for path in beside),
    ]
    return sorted(
        as_input(path) for place in folders for path in checkpoint_files(place)
    )


def backbone_files(run):
    """Local weights of the backbone, where the configuration names some."""
    weights = RUNS[run].perception.weights
    return (
        sorted(map(as_input, checkpoint_files(ROOT / weights, (".safetensors",))))
        if weights
        else []
    )


def reward_files(rewards):
    """Files on this machine that rewards are read from."""
    return sorted(map(as_input, local_files(rewards, ROOT)))


def prompt_files():
    """What prompts are made of where it is a file; a callable and a published set have none."""
    prompts = RUNS[FIRST].prompts
    named = filter(None, [*prompts.sources.values(), prompts.filters.blocklist])
    return [as_input(ROOT / name) for name in named if (ROOT / name).is_file()]


def finished_run(wildcards):
    """The finished run that is sampled; the base arm has none."""
    if RUNS[wildcards.run].is_base:
        return []
    run = f"{EXPERIMENT_DIR}/runs/{wildcards.run}"
    return [f"{run}/config.yaml", f"{run}/weights"]


def sampled_from(wildcards):
    """What a run's samples are drawn from."""
    return {
        "config": config_file(wildcards.run),
        "prompts": f"{EXPERIMENT_DIR}/prompts/eval.jsonl",
        "manifest": f"{EXPERIMENT_DIR}/prompts/manifest.json",
        "embeddings": f"{EXPERIMENT_DIR}/embeddings/eval.safetensors",
        "generator": generator_files(),
        "run": finished_run(wildcards),
    }


def scored_from(wildcards):
    """What a run's scores are of: its samples, and the base's."""
    samples = [f"{EXPERIMENT_DIR}/samples/{run}" for run in (wildcards.run, BASE)]
    return {
        "config": config_file(wildcards.run),
        "prompts": f"{EXPERIMENT_DIR}/prompts/eval.jsonl",
        "manifest": f"{EXPERIMENT_DIR}/prompts/manifest.json",
        "backbone": backbone_files(wildcards.run),
        "rewards": reward_files(RUNS[wildcards.run].evaluation.rewards),
        "samples": [
            f"{folder}/{name}"
            for folder in dict.fromkeys(samples)
            for name in ("samples.json", "pictures")
        ],
    }


def share_file(place, run, share):
    """What says that a share of a run's samples or scores is done, until all are put together."""
    return f"{EXPERIMENT_DIR}/{place}/.{run}-share-{share}.partial"


def shares(place, run):
    """The shares that a run's samples or scores are put together from; none where one job does all."""
    return (
        [share_file(place, run, number) for number in range(1, SHARES + 1)]
        if SHARES > 1
        else []
    )


def export_image_digest(image):
    """The image's SHA-256 for provenance: no image holds its own. Jobs inherit it, so that it is read once."""
    variable = "APPTAINERENV_VIPO_IMAGE_DIGEST"
    if workflow.is_main_process or variable not in os.environ:
        if not Path(image).is_file():
            raise WorkflowError(f"{image}: is missing; `make sif` builds it")
        os.environ.update(
            {
                variable: f"sha256:{file_sha256(Path(image))}",
                "APPTAINERENV_VIPO_IMAGE_FILE": image,
            }
        )


def wake_when_something_ended():
    """Let the scheduler look when a job ended, and no more.

    For its default limit of starts, which nothing here reaches, it looks again a second after every look: each job that
    ends begins one more such row of looks, of 3 ms each in a DAG of 237 jobs, and none of them ends before the DAG does.
    """
    limiter = workflow.scheduler.job_rate_limiter
    if limiter is not None and (limiter.max_jobs, limiter.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None
