"""The stages that train: a run, and the demo generator."""

import logging
from pathlib import Path

from vipo.config.pretrain import PretrainConfig
from vipo.config.run import Config
from vipo.prompts import told_split
from vipo.provenance import record_stage, run_lock
from vipo.stages.inputs import check_shared, make_missing
from vipo.stages.names import experiment_folder
from vipo.stages.ranks import launch_ranks

log = logging.getLogger(__name__)


def base_stage(config: PretrainConfig, root: Path, output: Path) -> None:
    """The demo generator into `output`; the state that it is resumed from lies beside it."""
    from vipo.training.pretrain import train_base

    with (
        run_lock(output),
        record_stage(
            "base",
            output,
            # Its scenes are drawn by the code.
            inputs=[],
            outputs=[output],
            config=config.model_dump(mode="json"),
            seeds=[config.seed],
            root=root,
        ),
    ):
        train_base(config, output, output.with_name(f".{output.name}.work"))


def train_stage(config: Config, root: Path, results: Path, wait: float = 0) -> None:
    """One run into ``runs/<arm>-s<seed>``; prompts and embeddings first where they are missing.

    Says what it reads before it loads it, and where the weights are and what comes next when it has them. Of a run that
    is finished nothing is loaded, and nothing is written.
    """
    from vipo.training.finished import finished_weights, next_command

    experiment = experiment_folder(config, results)
    if (weights := finished_weights(config, root, experiment)) is not None:
        log.info("%s: is finished, nothing is left to do; its weights are in %s", config.run_name, weights)
        log.info("next: %s", next_command(config, results))
        return
    rewards = ", ".join(term.title for term in config.reward.terms)
    backbone = f", backbone {config.perception.backbone}" if config.credit.reads_backbone else ""
    log.info(
        "%s: loading generator %s (%s), rewards %s%s",
        config.run_name, config.generator.path, config.generator.family, rewards, backbone,
    )  # fmt: skip
    _train(config, root, results, wait)
    log.info("%s: its weights are in %s", config.run_name, experiment / "runs" / config.run_name / "weights")
    log.info("next: %s", next_command(config, results))


def _train(config: Config, root: Path, results: Path, wait: float) -> None:
    from vipo.generators.compiler import check_compiler
    from vipo.generators.configured import check_device
    from vipo.training.launch import stop_with_launcher
    from vipo.training.ranks import is_rank
    from vipo.training.recorded import train_run

    check_device(config.generator)
    check_compiler(config.generator)
    experiment = experiment_folder(config, results)
    told = is_rank() or not (experiment / "prompts/manifest.json").is_file()
    make_missing(config, root, results, wait)
    counts = check_shared(config, root, experiment, "train")
    if not told:
        log.info("%s: %s", config.run_name, told_split(config, counts["train"], counts["eval"]))
    if config.distribution.world_size == 1 or is_rank():
        stop_with_launcher()
        train_run(config, root, experiment, wait)
        return
    launch_ranks(["train"], config, results, wait, config.distribution)
