"""The stage that measures credit at a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from vipo.config.comparable import check_comparable
from vipo.config.meter import MeterConfig
from vipo.config.run import Config
from vipo.provenance import record_stage, run_lock
from vipo.stages.inputs import check_shared, check_weights, make_missing
from vipo.stages.names import checkpoint_label, experiment_folder

#: In a measurement's folder: what it is resumed from.
MEASURED = ".measured.partial"


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
        ConfigError, MeterError: what cannot be measured as asked.
        Others: as of training.
    """
    from vipo.credit.meter.table import table
    from vipo.evaluation.meter import measure_credit, write_result
    from vipo.generators.compiler import check_compiler
    from vipo.generators.configured import check_device
    from vipo.memory import memory_errors
    from vipo.provenance.files import atomic_file
    from vipo.reporting.credit import draw_credit

    check_comparable(configs)
    config = next(iter(configs.values()))
    if weights is not None:
        check_weights(config, weights)
    check_device(config.generator)
    check_compiler(config.generator)
    experiment = experiment_folder(config, results)
    make_missing(config, root, results, wait)
    for split in ("train", "eval"):
        check_shared(config, root, experiment, split)
    output = experiment / "credit" / checkpoint_label(weights)
    files = [output / name for name in ("credit.json", "credit.svg")]
    remedy = "Lower experiment.meter.memory_mb or training.micro_batch, or set training.lora={}"
    with run_lock(output, wait_seconds=wait), memory_errors("vipo credit", remedy):
        measured = measure_credit(configs, meter, root, experiment, output / MEASURED, weights)
        with record_stage(
            "credit",
            output,
            inputs=measured.read,
            outputs=files,
            config={
                "meter": meter.model_dump(mode="json", exclude={"checkpoints"}),
                "arms": {name: own.training_identity() for name, own in configs.items()},
            },
            seeds=[config.seed],
            root=root,
            experiment=experiment,
            processes=measured.processes,
        ):
            with atomic_file(files[0]) as path:
                write_result(measured.result, configs, meter, path)
            with atomic_file(files[1]) as path:
                path.write_text(draw_credit(measured.result, meter.confidence).standalone(), encoding="utf-8")
    return "\n".join([table(measured.result, meter.size, meter.confidence), "", *map(str, files)])
