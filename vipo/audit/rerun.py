"""One stage once more, in a temporary place, from the same inputs: the same bytes or not."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from vipo.audit.examination import VOLATILE, Examination
from vipo.config.run import Config
from vipo.errors import Preempted, VipoError
from vipo.provenance.files import file_sha256
from vipo.provenance.records import ProvenanceError, experiment_files
from vipo.provenance.superseded import SUPERSEDED
from vipo.stages import (
    compare_stage,
    encode_stage,
    prepare_stage,
    report_stage,
    sample_stage,
    score_stage,
    summarize_stage,
    train_stage,
)

_RUN: Mapping[str, Callable[[Config, Path, Path], object]] = {
    "prepare": prepare_stage,
    "encode": encode_stage,
    "train": train_stage,
    "sample": sample_stage,
    "score": score_stage,
    "compare": compare_stage,
    "summarize": summarize_stage,
    "report": report_stage,
}


def rerun_stage(examination: Examination, folder: str) -> None:
    """Run the stage of a folder such as ``runs/vipo-s0`` again and compare what it writes, byte by byte.

    A stage that cannot be run here (no such device, no memory) is a remark: nothing was compared.

    Raises:
        ProvenanceError: there is no such stage, or no configuration of it.
        Preempted: a signal asked the stage to stop.
    """
    stages = examination.stages()
    if folder not in stages:
        raise ProvenanceError(f"--rerun {folder}: no such stage; choose one of {', '.join(stages)}")
    if stages[folder] not in _RUN:
        raise ProvenanceError(
            f"--rerun {folder}: a measurement is run again by 'vipo {stages[folder]}' with another --results, and its "
            "JSON compared"
        )
    # An evaluation's may name other processes than the training's.
    configs = examination.trained if stages[folder] == "train" else examination.configs
    config = configs.get(folder.partition("/")[2], examination.reported)
    if config is None:
        raise ProvenanceError(
            f"--rerun {folder}: its configuration is not here; restore what 'vipo audit' misses first"
        )
    with tempfile.TemporaryDirectory() as temporary:
        experiment = Path(temporary) / config.experiment.name
        _link_inputs(examination, folder, experiment)
        try:
            _RUN[stages[folder]](config, examination.root, Path(temporary))
        except Preempted:
            raise
        # What it may be is as wide as what a stage does; what is wrong with its inputs, other checks have found.
        except Exception as error:
            reason = str(error) if isinstance(error, VipoError) else f"{type(error).__name__}: {error}"
            examination.remark(
                folder, "rerun", f"could not be run again here ({reason}); nothing was compared",
                "run the audit on a machine like the one that made it (provenance.json names it)",
            )  # fmt: skip
            return
        _compare(examination, folder, experiment)


def _link_inputs(examination: Examination, folder: str, experiment: Path) -> None:
    """Everything of the experiment but what lies beside the stage's own folder."""
    experiment.mkdir(parents=True)
    for source in examination.folder.iterdir():
        if source.is_dir() and source.name not in (folder.partition("/")[0], SUPERSEDED):
            (experiment / source.name).symlink_to(source)


def _compare(examination: Examination, folder: str, again: Path) -> None:
    made = {name: file_sha256(again / name) for name in experiment_files(again) if name.startswith(f"{folder}/")}
    here = [name for name in examination.files if name.startswith(f"{folder}/")]
    advice = "docs/reproducibility.md says what is bit-identical where; other code, libraries or hardware may differ"
    for name in dict.fromkeys([*here, *made]):
        # The page is no output that equality is claimed for, but its inputs are the same here, so it is as well.
        if VOLATILE.fullmatch(name) and name != "report/index.html":
            continue
        if name not in made:
            examination.broken(name, "rerun", "the stage does not write it when it is run again", advice)
        elif name not in here:
            examination.broken(name, "rerun", "the stage writes it when it is run again, and it is not here", advice)
        elif examination.sha256(examination.folder / name) != made[name]:
            examination.broken(name, "rerun", "has other bytes when the stage is run again", advice)
