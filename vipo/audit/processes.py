"""Rewards that were computed in another process: whether the records say by what, and by the same one throughout."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vipo.audit.examination import Examination
from vipo.config.reward import RewardSpec
from vipo.config.reward_process import ASKED
from vipo.provenance.records import PROCESSES, PROVENANCE, differing_processes


def check_processes(examination: Examination) -> None:
    """Each run's records of training and evaluation tell what scored, of every term that another process scored."""
    for run, config in examination.trained.items():
        trained = _told(examination, f"runs/{run}", _asked(config.reward.terms))
        measured = _told(examination, f"evaluation/{run}", _asked(config.evaluation.rewards))
        if trained and measured:
            # It loads torch, which an audit without any does not need.
            from vipo.rewards import RewardError, check_identities

            try:
                check_identities(trained, measured, Path(f"runs/{run}/{PROVENANCE}"))
            except RewardError as error:
                examination.broken(f"evaluation/{run}", "lineage", str(error), "evaluate it again with that process")
    _check_one_measure(examination)
    for folder, labels in _measured_credit(examination):
        _told(examination, folder, labels)


def _asked(rewards: Iterable[RewardSpec]) -> list[str]:
    return [reward.label for reward in rewards if reward.name in ASKED]


def _check_one_measure(examination: Examination) -> None:
    """All runs, the base too, are measured by the same process: differences between them are of nothing else."""
    told = {
        folder: own
        for folder, record in examination.records.items()
        if folder.startswith("evaluation/") and isinstance(own := record.get(PROCESSES), dict)
    }
    for label, folder, other in differing_processes(told):
        examination.broken(
            folder, "lineage", f"another process scored {label!r} here than in {other}", "evaluate both by one"
        )


def _measured_credit(examination: Examination) -> Iterator[tuple[str, list[str]]]:
    """Each measurement of credit, and the labels of its terms that another process scored."""
    for folder, record in examination.records.items():
        if folder.startswith("credit/"):
            try:
                terms = next(iter(record["config"]["arms"].values()))["reward"]["terms"]
                # A name alone is no such term: it has options.
                named = [term for term in terms if not isinstance(term, str) and term["name"] in ASKED]
                yield folder, [term.get("label", term["name"]) for term in named]
            except (LookupError, TypeError, AttributeError, StopIteration):
                examination.broken(folder, "lineage", "its record names no reward", "run that stage again")


def _told(examination: Examination, folder: str, labels: Iterable[str]) -> Mapping[str, Any] | None:
    record = examination.records.get(folder)
    if record is None:
        return None
    told = record.get(PROCESSES, {})
    if not (isinstance(told, dict) and all(isinstance(value, dict) for value in told.values())):
        examination.broken(folder, "lineage", "its record names no reward processes that can be read", "make it again")
        return None
    for label in labels:
        if label not in told:
            examination.broken(
                folder, "lineage", f"its record does not say what scored {label!r}", "run that stage again"
            )
    return told
