"""The stages that sample, score and compare runs."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vipo.config.run import Config
from vipo.config.section import LONGEST_NAME
from vipo.config.validation import ConfigError
from vipo.prompts import check_prompts
from vipo.provenance import record_stage, run_lock
from vipo.stages.inputs import check_shared, check_weights
from vipo.stages.names import checkpoint_label, experiment_folder, run_names
from vipo.stages.ranks import launch_ranks
from vipo.text import listed, one_line

if TYPE_CHECKING:
    from vipo.evaluation.shares import Share

log = logging.getLogger(__name__)

# Of a hash, in a run's name.
_DIGITS = 8


def sample_stage(
    config: Config,
    root: Path,
    results: Path,
    wait: float = 0,
    share: str | None = None,
    weights: Path | None = None,
) -> None:
    """The held-out samples of one run's weights, or of the base, to ``samples/<arm>-s<seed>``.

    Where ``distribution.processes`` says so, several processes draw them together.

    Args:
        config, root, results, wait: as of every stage.
        share: ``NUMBER/COUNT``: draw this part of the work alone, for the stage to put together later.
        weights: see `evaluate_stage`.
    """
    from vipo.evaluation.sample import sample_run

    check_shared(config, root, experiment_folder(config, results), "eval")
    # Weights that are no run's are not handed on to other processes.
    processes = config.distribution.processes if weights is None else 1
    _evaluate("sample", partial(sample_run, weights=weights), config, root, results, wait, share, processes)


def score_stage(config: Config, root: Path, results: Path, wait: float = 0, share: str | None = None) -> None:
    """The samples of one run, scored beside those of the base, to ``evaluation/<arm>-s<seed>``; as `sample_stage`."""
    from vipo.evaluation.score import score_run

    check_prompts(experiment_folder(config, results) / "prompts", config.prompts)
    _evaluate("score", score_run, config, root, results, wait, share, config.distribution.processes)


def compare_stage(config: Config, root: Path, results: Path, wait: float = 0, also: Sequence[str] = ()) -> list[Path]:
    """The scores of all runs to tables in ``comparison/``.

    Args:
        config, root, results, wait: as of every stage.
        also: further runs, as `evaluate_stage` called other weights; each is an arm of the tables.

    Returns:
        The files.

    Raises:
        ConfigError: nothing of such a name is evaluated.
    """
    from vipo.evaluation.compare import TABLES, compare_runs, write_tables

    experiment = experiment_folder(config, results)
    there = sorted(path.parent.name for path in experiment.glob("evaluation/*/scores.parquet"))
    for name in also:
        if name not in there:
            told = f"is not evaluated in {experiment}; there are: {listed(there, 8)}"
            raise ConfigError(f"--also {one_line(name, 200)}: {told}")
    runs = list(dict.fromkeys([*run_names(config), *also]))
    output = experiment / "comparison"
    inputs = [experiment / "prompts" / "eval.jsonl"]
    inputs += [experiment / "evaluation" / run / "scores.parquet" for run in runs]
    inputs += [experiment / "samples" / run / "pictures" for run in runs]
    with (
        run_lock(output, wait_seconds=wait),
        record_stage(
            "compare",
            output,
            inputs=inputs,
            outputs=[output / f"{name}.csv" for name in TABLES],
            config=config.report_identity(),
            # Of the bootstrap.
            seeds=[config.evaluation.seed],
            root=root,
        ),
    ):
        return write_tables(compare_runs(config, experiment, runs), output)


def evaluate_stage(config: Config, root: Path, results: Path, wait: float = 0, weights: Path | None = None) -> None:
    """Sample one run, and the base where nobody has, and score the run.

    Args:
        config, root, results, wait: as of every stage.
        weights: folder of weights of this generator in place of the run's: a checkpoint's, an average's, a LoRA. Their
            evaluation is called as the folder is and by eight digits of their hash: it takes no trained run's place,
            nor that of other weights in a folder of that name.
    """
    if weights is not None:
        config = _of_weights(config, weights)
    sample_stage(config, root, results, wait, weights=weights)
    if not config.is_base:
        sample_stage(config.as_base(), root, results, wait)
    score_stage(config, root, results, wait)


def _of_weights(config: Config, weights: Path) -> Config:
    """A run that is these weights alone."""
    from vipo.training.state import content_hash

    check_weights(config, weights)
    digits = content_hash(weights)[:_DIGITS]
    label = re.sub(r"[^a-z0-9]+", "_", checkpoint_label(weights).lower()).strip("_") or "weights"
    arm = f"{label[: LONGEST_NAME - _DIGITS - 1]}_{digits}"
    if arm in config.experiment.arms:
        raise ConfigError(f"--weights {weights}: the experiment has an arm {arm!r}; rename the folder")
    training = config.training.model_copy(update={"save_at": ()})
    found = config.model_copy(update={"arm": arm, "training": training})
    log.info("%s is evaluated as %s", weights, found.run_name)
    return found


def _evaluate(
    stage: str,
    run: "Callable[[Config, Path, Path, Share | None, float], None]",
    config: Config,
    root: Path,
    results: Path,
    wait: float,
    share: str | None,
    processes: int,
) -> None:
    from vipo.determinism import prepare_process
    from vipo.evaluation.shares import Share
    from vipo.generators.compiler import check_compiler
    from vipo.generators.configured import check_device
    from vipo.memory import memory_errors
    from vipo.training.launch import stop_with_launcher
    from vipo.training.ranks import check_own_gpu, is_rank, own_place

    check_device(config.generator)
    if stage == "sample":
        check_compiler(config.generator)
    experiment = experiment_folder(config, results)
    own, local = None if share is None else Share.parse(share), 0
    if processes > 1:
        if not is_rank():
            part = [] if share is None else ["--share", share]
            here = config.distribution.model_copy(update={"nodes": 1, "processes": _one_a_gpu(config, processes)})
            if here.processes > 1:
                launch_ranks(["evaluate", "--only", stage, *part], config, results, wait, here)
        else:
            stop_with_launcher()
            place = own_place(os.environ)
            check_own_gpu(place, config.generator.device)
            own = (own or Share()).split(place.rank, place.size)
            local = place.local_rank
    prepare_process(config.generator.device, config.training.threads, local)
    remedy = "Lower evaluation.batch, or raise cluster.evaluate.memory_mb"
    with memory_errors(f"{stage} of {config.run_name}", remedy), contextlib.ExitStack() as locked:
        if own is None:
            folder = experiment / ("samples" if stage == "sample" else "evaluation") / config.run_name
            locked.enter_context(run_lock(folder, wait_seconds=wait))
        run(config, root, experiment, own, wait)


def _one_a_gpu(config: Config, processes: int) -> int:
    """As many of the `processes` as this node has GPUs for: the files are the same of any number."""
    import torch

    if config.generator.device != "cuda" or processes <= (there := torch.cuda.device_count()):
        return processes
    log.info(
        "%s: CUDA devices here: %d, so as many processes, not distribution.processes %d",
        config.run_name, there, processes,
    )  # fmt: skip
    return there
