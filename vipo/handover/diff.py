"""Two runs compared: what differs in configuration, code, environment and data, and what came of it."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vipo.config.run import Config
from vipo.config.values import flattened
from vipo.handover.diff_outcome import Evaluation, Training, compare_evaluation, compare_training
from vipo.provenance.records import PROVENANCE
from vipo.reporting.runs import RunRecords, read_run

Decides = Literal["training", "evaluation", "nothing"]

_DECIDES: tuple[Decides, ...] = get_args(Decides)
_SHARED_INPUT = re.compile(r"(?:^|/)((?:prompts|embeddings)/(?:train|eval)\.\w+)\Z")
_MADE = re.compile(r"(?:^|/)(?:runs/[^/]+-s\d+/(?:weights|updates)/|samples/[^/]+-s\d+/)")


@dataclass(frozen=True)
class ConfigDifference:
    """One key of the configuration; a key that only one side has is null on the other.

    `decides` is what the key can change: the trained weights, only the evaluation of given weights, or neither.
    """

    key: str
    a: Any
    b: Any
    decides: Decides


@dataclass(frozen=True)
class Difference:
    """One recorded fact that differs in `stages`."""

    key: str
    stages: tuple[str, ...]
    a: Any
    b: Any


@dataclass(frozen=True)
class RunDiff:
    """B against A. `training` and `evaluation` are None where a run lacks them, as `notes` then says.

    `recorded` are the stages that both runs have a record of here; `code`, `environment` and `data` compare these, and
    are None where there is none.
    """

    a: str
    b: str
    config: tuple[ConfigDifference, ...]
    recorded: tuple[str, ...]
    code: tuple[Difference, ...] | None
    environment: tuple[Difference, ...] | None
    data: tuple[Difference, ...] | None
    training: Training | None
    evaluation: Evaluation | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, hashes in full."""
        return asdict(self)


def diff_runs(a: Path, b: Path) -> RunDiff:
    """Compare two runs, of one experiment or of two.

    Args:
        a, b: folders ``results/<experiment>/runs/<arm>-s<seed>``.

    Raises:
        ReportError: no run is there, or metrics or scores are malformed.
        ConfigError, ProvenanceError: a configuration or a record is damaged.
        ScoresError: scores have doubled or missing pairs.
    """
    left, right = read_run(a), read_run(b)
    return RunDiff(
        a=str(a),
        b=str(b),
        config=_config(left.config, right.config),
        recorded=tuple(stage for stage, _, _ in _records(left, right)),
        code=_recorded(left, right, _code),
        environment=_recorded(left, right, _environment),
        data=_recorded(left, right, _data),
        training=compare_training(left, right),
        evaluation=compare_evaluation(left, right),
        notes=tuple(note for run in (left, right) for note in _notes(run)),
    )


def _config(a: Config, b: Config) -> tuple[ConfigDifference, ...]:
    sides = [dict(flattened(config.model_dump(mode="json"))) for config in (a, b)]
    trains, evaluates = (
        {key for config in (a, b) for key, _ in flattened(getattr(config, f"{stage}_identity")())}
        for stage in ("training", "evaluation")
    )
    found = [
        ConfigDifference(
            key,
            sides[0].get(key),
            sides[1].get(key),
            "training" if key in trains else "evaluation" if key in evaluates else "nothing",
        )
        for key in dict.fromkeys([*sides[0], *sides[1]])
        if sides[0].get(key) != sides[1].get(key)
    ]
    return tuple(sorted(found, key=lambda row: _DECIDES.index(row.decides)))


def _records(a: RunRecords, b: RunRecords) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """The stages that both runs have a record of, with both."""
    stages = (
        ("train", a.training, b.training),
        ("sample", a.sampling, b.sampling),
        ("score", a.evaluation, b.evaluation),
    )
    for stage, left, right in stages:
        if left is not None and right is not None:
            yield stage, left, right


def _recorded(
    a: RunRecords, b: RunRecords, facts: Callable[[Mapping[str, Any]], Iterator[tuple[str, Any]]]
) -> tuple[Difference, ...] | None:
    """Facts that differ between the records of one stage, each once with all stages that it differs in alike."""
    records = list(_records(a, b))
    if not records:
        return None
    found: dict[str, Difference] = {}
    for stage, left, right in records:
        sides = [dict(facts(record)) for record in (left, right)]
        for key in dict.fromkeys([*sides[0], *sides[1]]):
            values = sides[0].get(key), sides[1].get(key)
            if values[0] != values[1]:
                same = found.get(f"{key} {values}")
                stages = (stage,) if same is None else (*same.stages, stage)
                found[f"{key} {values}"] = Difference(key, stages, *values)
    return tuple(found.values())


def _code(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from flattened({key: record.get(key) for key in ("package_sha256", "git", "checkout", "updates_made_by")})


def _environment(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    keys = ("lock_sha256", "installed_sha256", "container_digest", "versions", "hardware")
    yield from flattened({key: record.get(key) for key in keys})


def _data(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """SHA-256 of the stage's input files by role; weights and samples are results of the runs themselves."""
    for entry in record["inputs"]:
        shared = _SHARED_INPUT.search(entry["path"])
        if shared:
            yield shared[1], entry["sha256"]
        elif not _MADE.search(entry["path"]):
            role = "generator" if "model_index.json" in entry.get("files", {}) else "backbone"
            files = entry.get("files", {Path(entry["path"]).name: entry})
            yield from ((f"{role}: {name}", file["sha256"]) for name, file in files.items())


def _notes(run: RunRecords) -> Iterator[str]:
    unrecorded = f"is not recorded here (a pull brings no {PROVENANCE}): no code, environment, data to compare"
    metrics = run.folder / "metrics.jsonl"
    if run.config.is_base:
        yield f"{run.name} is the generator as it was: it has no training to compare"
    elif not run.is_trained:
        yield f"{run.name} has no final weights here: it did not finish training, or they were not pulled"
    elif run.training is None:
        yield f"the training of {run.name} {unrecorded}"
    if not run.config.is_base and run.training is None and not metrics.is_file():
        yield f"{metrics}: not here, so the training is not compared"
    if not run.is_evaluated:
        yield f"{run.name} has no scores here: run vipo evaluate with its configuration, or pull them"
    elif run.evaluation is None:
        yield f"the evaluation of {run.name} {unrecorded}"
    if run.stale is not None:
        yield run.stale
    for path in (run.folder / "config.yaml", run.folder / "metrics.jsonl", run.evaluated / "scores.parquet"):
        if (problem := run.changed(path)) is not None:
            yield problem
