"""Rewards that were computed in another process: whether the records say by what, and by the same one throughout."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vipo.audit.examination import Examination
from vipo.config.reward import RewardSpec
from vipo.config.reward_process import ASKED
from vipo.provenance.records import PROVENANCE


def check_processes(examination: Examination) -> None:
    """Each run's records of training and evaluation tell what scored, of every term that another process scored."""
    for run, config in examination.trained.items():
        trained = _told(examination, f"runs/{run}", config.reward.terms)
        measured = _told(examination, f"evaluation/{run}", config.evaluation.rewards)
        if trained and measured:
            # It loads torch, which an audit without any does not need.
            from vipo.rewards import RewardError, check_identities

            try:
                check_identities(trained, measured, Path(f"runs/{run}/{PROVENANCE}"))
            except RewardError as error:
                examination.broken(f"evaluation/{run}", "lineage", str(error), "evaluate it again with that process")


def _told(examination: Examination, folder: str, rewards: Iterable[RewardSpec]) -> Mapping[str, Any] | None:
    record = examination.records.get(folder)
    if record is None:
        return None
    told = record.get("reward_processes", {})
    if not (isinstance(told, dict) and all(isinstance(value, dict) for value in told.values())):
        examination.broken(folder, "lineage", "its record names no reward processes that can be read", "make it again")
        return None
    for reward in rewards:
        if reward.name in ASKED and reward.label not in told:
            examination.broken(
                folder, "lineage", f"its record does not say what scored {reward.label!r}", "run that stage again"
            )
    return told
