"""The DAG's stages: each reads files of ``results/<experiment>`` and writes files there (`base_stage`: a generator's).

A stage holds the lock of the folder that it writes. Where another process has it, the stage waits for up to `wait`
seconds (0: not at all) and then raises `RunLocked`; where it gets the lock in time it does its work again on top of the
other's, from the newest checkpoint if it trains, and ends with the same bytes.
"""

import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from vipo.config.compose import dump_config
from vipo.config.experiment import check_run
from vipo.config.meter import MeterConfig
from vipo.config.pretrain import PretrainConfig
from vipo.config.run import Config
from vipo.prompts import Prompt, check_needs, check_prompts, prepare_prompts
from vipo.provenance import ProvenanceError, record_stage, run_lock, sign_file
from vipo.provenance.lineage import PROVENANCE

log = logging.getLogger(__name__)

#: In a measurement's folder: what it is resumed from.
MEASURED = ".measured.partial"


def experiment_folder(config: Config, results: Path) -> Path:
    """``<results>/<experiment>``."""
    return results / config.experiment.name


def run_names(config: Config) -> list[str]:
    """All runs of the experiment, in the order of its arms and seeds."""
    return [f"{name}-s{seed}" for name, arm in config.experiment.arms.items() for seed in arm.seeds]


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


def prepare_stage(config: Config, root: Path, results: Path, wait: float = 0, readers: Sequence[Config] = ()) -> None:
    """Prompt source to ``prompts/{train,eval}.jsonl`` and ``manifest.json``; nothing where a run could not use them.

    Args:
        config: of any run.
        root, results, wait: as of every stage.
        readers: other runs that will read the prompts; what they need is checked too.
    """
    with run_lock(experiment_folder(config, results) / "prompts", wait_seconds=wait):
        _prepare(config, root, results, readers)


def _prepare(config: Config, root: Path, results: Path, readers: Sequence[Config] = ()) -> None:
    runs = [config, *readers]
    for run in runs:
        check_run(run)

    def accept(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
        for run in runs:
            check_needs(run, train, held_out)

    folder = experiment_folder(config, results) / "prompts"
    source = root / config.prompts.source
    with record_stage(
        "prepare",
        folder,
        # A callable source has no file; a missing file is prepare_prompts' own error.
        inputs=[source] if source.is_file() else [],
        outputs=[folder / name for name in ("train.jsonl", "eval.jsonl", "manifest.json")],
        config=config.prompts_identity(),
        root=root,
        experiment=experiment_folder(config, results),
    ):
        prepare_prompts(config.prompts, root, folder, accept)


def encode_stage(config: Config, root: Path, results: Path, wait: float = 0) -> None:
    """Prepared prompts to ``embeddings/{train,eval}.safetensors``."""
    with run_lock(experiment_folder(config, results) / "embeddings", wait_seconds=wait):
        _encode(config, root, results)


def _encode(config: Config, root: Path, results: Path) -> None:
    import torch

    from vipo.generators.base import checkpoint_inputs
    from vipo.generators.embeddings import encode_prompt_file
    from vipo.memory import memory_errors

    torch.set_num_threads(config.training.threads)
    experiment = experiment_folder(config, results)
    prompts, folder = experiment / "prompts", experiment / "embeddings"
    remedy = "Give this stage a device with more memory, or raise cluster.encode.memory_mb"
    with (
        memory_errors("encode", remedy),
        record_stage(
            "encode",
            folder,
            inputs=[prompts / "train.jsonl", prompts / "eval.jsonl", *checkpoint_inputs(config.generator, root)],
            outputs=[folder / "train.safetensors", folder / "eval.safetensors"],
            config=config.embeddings_identity(),
            root=root,
            experiment=experiment,
        ),
    ):
        for split in ("train", "eval"):
            source, output = prompts / f"{split}.jsonl", folder / f"{split}.safetensors"
            encode_prompt_file(config.generator, root, source, output, config.embeddings_identity())


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
    from vipo.generators.base import check_device
    from vipo.training.launch import launch, stop_with_launcher
    from vipo.training.ranks import is_rank
    from vipo.training.recorded import train_run

    check_device(config.generator)
    experiment = experiment_folder(config, results)
    _make_missing(config, root, results, wait)
    _check_shared(config, root, experiment, "train")
    if config.distribution.world_size == 1 or is_rank():
        stop_with_launcher()
        train_run(config, root, experiment, wait)
        return
    # A file of their own: one in the results would be another job's as well.
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / f"{config.run_name}.yaml"
        resolved.write_text(dump_config(config), encoding="utf-8")
        files = ["--config", str(resolved), "--results", str(results), "--wait", str(wait)]
        # -P, for the working directory may hold another vipo.
        command = [sys.executable, "-P", "-m", "vipo.cli", "train", *files]
        launch(command, config.distribution, config.training.threads)


def _make_missing(config: Config, root: Path, results: Path, wait: float) -> None:
    """Prompts and embeddings, where the results folder lacks them."""
    from vipo.training.ranks import is_rank

    for made, make in (("prompts/manifest.json", _prepare), ("embeddings/train.safetensors", _encode)):
        path = experiment_folder(config, results) / made
        if not path.is_file():
            # Of several nodes or ranks each would make it, and some would stop at the lock of another.
            if is_rank() or config.distribution.nodes > 1:
                raise ProvenanceError(
                    f"{path}: missing; run 'vipo prepare' and 'vipo encode' first, before several nodes or ranks start"
                )
            with run_lock(path.parent, wait_seconds=wait):
                # Whoever held the lock may just have made it.
                if not path.is_file():
                    make(config, root, results)


def evaluate_stage(config: Config, root: Path, results: Path, wait: float = 0) -> None:
    """One run's weights to ``evaluation/<arm>-s<seed>``."""
    from vipo.evaluation.evaluate import evaluate_run
    from vipo.generators.base import check_device
    from vipo.memory import memory_errors

    check_device(config.generator)
    experiment = experiment_folder(config, results)
    _check_shared(config, root, experiment, "eval")
    remedy = "Lower evaluation.batch, or raise cluster.evaluate.memory_mb"
    with (
        memory_errors(f"evaluation of {config.run_name}", remedy),
        run_lock(experiment / "evaluation" / config.run_name, wait_seconds=wait),
    ):
        evaluate_run(config, root, experiment)


def _check_shared(config: Config, root: Path, experiment: Path, split: str) -> None:
    # All runs read the same prompts and embeddings, so a run refuses other ones instead of replacing them.
    from vipo.generators.embeddings import check_embeddings, encoder_hashes

    prompts = experiment / "prompts"
    check_prompts(prompts, config.prompts)
    check_embeddings(
        experiment / "embeddings" / f"{split}.safetensors",
        prompts / f"{split}.jsonl",
        config.embeddings_identity(),
        encoder_hashes(config.generator, root),
    )


def summarize_stage(config: Config, root: Path, results: Path, wait: float = 0) -> Path:
    """All runs of the experiment to the report's numbers, ``report/data``: the same bytes for the same results."""
    from vipo.reporting import build_data

    experiment, runs = experiment_folder(config, results), run_names(config)
    output = experiment / "report" / "data"

    def written() -> list[Path]:
        found = (path for path in sorted(output.rglob("*")) if path.is_file() and not path.name.startswith(".lock"))
        return [path for path in found if path.name != PROVENANCE]

    with (
        # The page's folder: its own is replaced as a whole, and a lock in it with it.
        run_lock(output.parent, wait_seconds=wait),
        record_stage(
            "summarize",
            output,
            inputs=_measured(experiment, runs),
            outputs=written,
            config=config.report_identity(),
            # Of the intervals' bootstrap.
            seeds=[config.evaluation.seed],
            root=root,
        ),
    ):
        return build_data(experiment, runs, config, output)


def report_stage(config: Config, root: Path, results: Path, wait: float = 0) -> Path:
    """All runs of the experiment to ``report/index.html``; the numbers beside it first where they are missing.

    Times and records that are not here (results that were pulled come without them) are shown as such.
    """
    from vipo.reporting import TIMES, build_report
    from vipo.reporting.measured import measurement_files

    experiment, runs = experiment_folder(config, results), run_names(config)
    output = experiment / "report"
    data = output / "data" / "report.json"
    if not data.is_file():
        summarize_stage(config, root, results, wait)
    shown = [experiment / "evaluation" / run / name for run in runs for name in ("maps.safetensors", "samples")]
    volatile = [experiment / "runs" / run / name for run in runs for name in ("timing.jsonl", PROVENANCE)]
    with (
        run_lock(output, wait_seconds=wait),
        record_stage(
            "report",
            output,
            inputs=[
                data,
                *_measured(experiment, runs),
                *shown,
                *measurement_files(experiment, config.experiment.meter),
                *(path for path in volatile if path.is_file()),
            ],
            outputs=lambda: [path for name in ("index.html", *TIMES) if (path := output / name).is_file()],
            config=config.report_identity(),
            # The page is checked against the numbers, computed once more.
            seeds=[config.evaluation.seed],
            root=root,
        ),
    ):
        return build_report(experiment, runs, config, output)


def _measured(experiment: Path, runs: Sequence[str]) -> list[Path]:
    paths = [experiment / "prompts" / name for name in ("train.jsonl", "eval.jsonl", "manifest.json")]
    for run in runs:
        paths += [experiment / "evaluation" / run / name for name in ("config.yaml", "scores.parquet")]
        if not run.startswith("base-"):
            paths.append(experiment / "runs" / run / "metrics.jsonl")
    return paths


def crate_stage(
    config: Config, root: Path, results: Path, wait: float = 0, key: Path | None = None, archive: bool = False
) -> list[Path]:
    """Everything of the experiment, described in ``ro-crate-metadata.json``, signed and zipped where asked for.

    Returns:
        The files written, the metadata first.
    """
    from vipo.provenance.crate import write_crate, zip_crate

    experiment = experiment_folder(config, results)
    with run_lock(experiment / "crate", wait_seconds=wait):
        written = [write_crate(experiment, root)]
        if key is not None:
            written.append(sign_file(written[0], key))
        if archive:
            written.append(zip_crate(experiment))
    return written


def credit_stage(
    configs: Mapping[str, Config],
    meter: MeterConfig,
    root: Path,
    results: Path,
    weights: Path | None = None,
    wait: float = 0,
) -> str:
    """What the arms' credit is worth at one checkpoint, into ``credit/<checkpoint>``.

    Prompts and embeddings are made first where they are missing.

    Args:
        configs: the arms by name; the first is what the others are compared with.
        meter: how much is measured.
        root, results, wait: as of every stage.
        weights: folder of a run's weights; None: the generator as it is.

    Returns:
        The table, and where the files are.

    Raises:
        MeterError: what cannot be measured as asked.
        Others: as of training.
    """
    from vipo.credit.meter.gradients import MeterError
    from vipo.credit.meter.table import table
    from vipo.evaluation.meter import measure_credit, write_result
    from vipo.generators.base import check_device
    from vipo.memory import memory_errors
    from vipo.provenance.files import atomic_file
    from vipo.reporting.credit import draw_credit

    if weights is not None and not weights.is_dir():
        raise MeterError(f"--weights {weights}: no such folder; give a run's weights/, or one of its updates/")
    config = next(iter(configs.values()))
    check_device(config.generator)
    experiment = experiment_folder(config, results)
    _make_missing(config, root, results, wait)
    for split in ("train", "eval"):
        _check_shared(config, root, experiment, split)
    output = experiment / "credit" / checkpoint_label(weights)
    files = [output / name for name in ("credit.json", "credit.svg")]
    remedy = "Lower experiment.meter.memory_mb or training.micro_batch, or set training.lora={}"
    with run_lock(output, wait_seconds=wait), memory_errors("vipo credit", remedy):
        result, read = measure_credit(configs, meter, root, experiment, output / MEASURED, weights)
        with record_stage(
            "credit",
            output,
            inputs=read,
            outputs=files,
            config={
                "meter": meter.model_dump(mode="json", exclude={"checkpoints"}),
                "arms": {name: own.training_identity() for name, own in configs.items()},
            },
            seeds=[config.seed],
            root=root,
        ):
            with atomic_file(files[0]) as path:
                write_result(result, configs, meter, path)
            with atomic_file(files[1]) as path:
                path.write_text(draw_credit(result, meter.confidence).standalone(), encoding="utf-8")
    return "\n".join([table(result, meter.size, meter.confidence), "", *map(str, files)])


def checkpoint_label(weights: Path | None) -> str:
    """Name of a checkpoint's folder: ``base``, ``<run>``, ``<run>-u12``, or that of any other folder."""
    if weights is None:
        return "base"
    folder = weights.resolve()
    if folder.name == "weights":
        return folder.parent.name
    return f"{folder.parent.parent.name}-u{int(folder.name)}" if folder.parent.name == "updates" else folder.name


def study_stage(configs: Sequence[Config], results: Path, output: Path) -> Path:
    """Several experiments' results to the study's tables, figures and page; the first one's configuration decides."""
    from vipo.reporting.study import build_study

    return build_study([(experiment_folder(config, results), run_names(config), config) for config in configs], output)
