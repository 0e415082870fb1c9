"""One run by its folder: configuration, the records of its stages, and whether they belong together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vipo.config.compose import load_config_file
from vipo.config.evaluation import EvaluationConfig
from vipo.config.run import Config
from vipo.config.training import EMA
from vipo.config.values import config_hash
from vipo.evaluation.statistics import Better, Interval, paired_difference
from vipo.provenance.files import file_sha256
from vipo.provenance.records import PROVENANCE, absolute_path, entry_files, files_below, read_provenance
from vipo.reporting.inputs import ReportError


def measured_columns(scores: pd.DataFrame) -> list[str]:
    """The columns of an evaluation that compare runs: rewards and changes."""
    return [str(name) for name in scores.columns if str(name).startswith(("reward/", "change/"))]


def trained_direction(column: str, *configs: Config) -> Better | None:
    """The direction in which a reward was trained; None where no run trained it, or two did in opposite ones."""
    signs = {
        term.weight > 0
        for config in configs
        if not config.is_base
        for term in config.reward.terms
        if f"reward/{term.label}" == column and term.weight != 0
    }
    return None if len(signs) != 1 else "higher" if signs == {True} else "lower"


def configured_difference(
    scores: pd.DataFrame, reference: pd.DataFrame, column: str, settings: EvaluationConfig
) -> Interval:
    """`paired_difference` with the resamples, confidence and seed of a section `evaluation`."""
    return paired_difference(
        scores,
        reference,
        column,
        resamples=settings.bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
    )


@dataclass(frozen=True)
class RunRecords:
    """What the stages left of one run.

    Attributes:
        experiment: ``results/<experiment>``.
        config: of the training, with the section `evaluation` that the evaluation was made with, where it is known.
        training: provenance of the train stage; None for the base, for a run that did not finish, and where it was not
            recorded here: results that were pulled come without it.
        sampling, evaluation: provenance of the sample and score stages; None where they were not made or not recorded
            here.
        stale: why the evaluation is not one of this configuration and these weights; None where it is.
    """

    experiment: Path
    config: Config
    training: Mapping[str, Any] | None
    sampling: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    stale: str | None

    @property
    def name(self) -> str:
        """``<arm>-s<seed>``."""
        return self.config.run_name

    @property
    def folder(self) -> Path:
        """Where the run was trained."""
        return self.experiment / "runs" / self.name

    @property
    def evaluated(self) -> Path:
        """Where it was evaluated."""
        return self.experiment / "evaluation" / self.name

    @property
    def pictures(self) -> Path:
        """Where its samples are."""
        return self.experiment / "samples" / self.name / "pictures"

    @property
    def is_trained(self) -> bool:
        """Whether the training has finished: the final weights are what it writes last."""
        return self.training is not None or (self.folder / "weights").is_dir()

    @property
    def is_evaluated(self) -> bool:
        """Whether there are scores."""
        return self.evaluation is not None or (self.evaluated / "scores.parquet").is_file()

    @property
    def weights(self) -> dict[str, str]:
        """Files of the final weights, below ``weights/``, and their SHA-256: as recorded, else as they are here."""
        if self.training is None:
            folder = self.folder / "weights"
            return {name: file_sha256(folder / name) for name in files_below(folder)}
        found = ((_below(path, self.name), sha256) for path, sha256 in recorded_files(self.training, "outputs"))
        return {place.removeprefix("weights/"): sha256 for place, sha256 in found if place.startswith("weights/")}

    def changed(self, path: Path) -> str | None:
        """What is wrong with a file that a stage of this run wrote: ``<path>: <problem>``, or None.

        Only the part of recorded paths below the experiment's folder counts: results may have been copied.
        """
        place = path.relative_to(self.experiment).as_posix()
        found = file_sha256(path) if path.is_file() else None
        for record in (self.training, self.sampling, self.evaluation):
            for recorded, sha256 in recorded_files(record, "outputs"):
                if recorded.endswith(f"/{place}") and found != sha256:
                    return f"{path}: {'missing' if found is None else 'changed since its stage wrote it'}"
        return None


def read_run(path: Path) -> RunRecords:
    """The records of a run.

    Args:
        path: ``results/<experiment>/runs/<arm>-s<seed>``. The base is never trained, its folder need not exist.

    Raises:
        ReportError: no run is there.
        ConfigError, ProvenanceError: its configuration or a record is damaged.
    """
    folder = absolute_path(path)
    experiment, name = folder.parent.parent, folder.name
    evaluated = experiment / "evaluation" / name / "config.yaml"
    files = (experiment / "runs" / name / "config.yaml", evaluated, experiment / "configs" / f"{name}.yaml")
    found = {file: load_config_file(file) for file in files if file.is_file()}
    configs = list(found.values())
    if folder.parent.name != "runs" or not configs or configs[0].run_name != name:
        raise ReportError(
            f"{path}: no run is there; give a folder results/<experiment>/runs/<arm>-s<seed> that was trained, "
            "or that of the base, which was evaluated"
        )
    records = [
        read_provenance(record) if record.is_file() else None
        for record in (experiment / part / name / PROVENANCE for part in ("runs", "samples", "evaluation"))
    ]
    training, sampling, evaluation = records
    config = configs[0]
    # The evaluation's settings may be others than those that the run was trained with.
    if evaluation is not None:
        own = [item for item in configs if config_hash(item.evaluation_identity()) == evaluation.get("config_sha256")]
    else:
        # Without its record, they are those beside the scores.
        beside = found.get(evaluated, config)
        own = [beside] if beside.training_identity() == config.training_identity() else []
    stale: str | None = f"{evaluated.parent}: was made with another configuration; evaluate {name} again"
    if own:
        config = config.model_copy(update={"evaluation": own[0].evaluation})
        stale = None if evaluation is None else _other_weights(experiment, config, training, sampling or evaluation)
    return RunRecords(experiment, config, training, sampling, evaluation, stale)


def recorded_files(record: Mapping[str, Any] | None, part: str) -> Iterator[tuple[str, str]]:
    """Path (as recorded) and SHA-256 of every file of a record's `inputs` or `outputs`; nothing of None."""
    for entry in () if record is None else record[part]:
        for recorded, file in entry_files(entry).items():
            yield recorded, file["sha256"]


def _other_weights(
    experiment: Path, config: Config, training: Mapping[str, Any] | None, sampling: Mapping[str, Any]
) -> str | None:
    name = config.run_name
    folder = experiment / "runs" / name
    trained = {_below(path, name): sha256 for path, sha256 in recorded_files(training, "outputs")}
    read = {_below(path, name): sha256 for path, sha256 in recorded_files(sampling, "inputs") if _below(path, name)}
    if training is None:
        # Weights that were pulled and evaluated here; what is not here contradicts nothing.
        trained = {place: file_sha256(folder / place) if (folder / place).is_file() else read[place] for place in read}
    told = f"{experiment / 'evaluation' / name}: was made with"
    if any(trained.get(place) != sha256 for place, sha256 in read.items()):
        return f"{told} other weights than {name} has now; evaluate it again"
    # An earlier vipo scored what it found drawn, of whichever weights.
    final = [place for place in read if place.startswith("weights/")]
    drawn = EMA if all(place.startswith(f"weights/{EMA}/") for place in final) else "trained"
    if final and drawn != config.evaluation.weights:
        return f"{told} the weights {drawn!r}, evaluation.weights is {config.evaluation.weights!r}; evaluate it again"
    return None


def _below(path: str, name: str) -> str:
    return path.rpartition(f"/runs/{name}/")[2] if f"/runs/{name}/" in path else ""
