"""Configurations validate, and are those that the stages recorded."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vipo.audit.examination import Examination
from vipo.config.compose import load_config, load_config_file
from vipo.config.models import Config, config_hash
from vipo.provenance.dvc import LOCK, LockedStage
from vipo.provenance.environment import package_sha256
from vipo.provenance.lineage import PROVENANCE

#: What of a configuration decides a stage's result, as the stage records it.
_IDENTITIES: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "prepare": Config.prompts_identity,
    "encode": Config.embeddings_identity,
    "train": Config.training_identity,
    "evaluate": Config.evaluation_identity,
    "report": lambda config: config.experiment.model_dump(mode="json"),
}
_FILE = re.compile(r"(configs/(?P<run>[^/]+)\.yaml|runs/(?P<trained>[^/]+)/config\.yaml)")


def check_configurations(examination: Examination, locked: Sequence[LockedStage]) -> int:
    """Read and compare every configuration; returns how many there are.

    One that is not here is composed as the stage's command in ``dvc.lock`` says.
    """
    trained: dict[str, Config] = {}
    count = 0
    for name in examination.files:
        match = _FILE.fullmatch(name)
        if match is None:
            continue
        count += 1
        with examination.guarded(name, "configuration"):
            run, config = match["run"] or match["trained"], load_config_file(examination.folder / name)
            if config.run_name != run:
                examination.broken(
                    name, "configuration", f"is of run {config.run_name}, not {run}", "restore it, or compose it again"
                )
            elif match["run"]:
                examination.configs[run] = config
            else:
                trained[run] = config
    for run, config in trained.items():
        # The workflow's copy is not kept by DVC; the run's own says the same.
        other = examination.configs.setdefault(run, config)
        if other.training_identity() != config.training_identity():
            differing = _differing(other.training_identity(), config.training_identity())
            examination.broken(
                f"configs/{run}.yaml", "configuration", f"is not what {run} was trained with: {', '.join(differing)}",
                "restore it, or train the run again",
            )  # fmt: skip
    for stage in locked:
        command = shlex.split(stage.command)
        if command[:1] == ["vipo"] and not any(word.startswith("-") for word in command):
            with examination.guarded(LOCK, "configuration"):
                composed = load_config(command[2:])
                examination.configs.setdefault(composed.run_name, composed)
    for folder, record in examination.records.items():
        with examination.guarded(f"{folder}/{PROVENANCE}", "configuration"):
            _check_recorded(examination, folder, record)
    return count


def _check_recorded(examination: Examination, folder: str, record: Mapping[str, Any]) -> None:
    run = folder.partition("/")[2] or next(iter(examination.configs), "")
    if run not in examination.configs:
        examination.broken(
            folder, "configuration", f"no configuration of {run or 'any run'} is here to compare with the record",
            "restore configs/, or let the workflow write it again",
        )  # fmt: skip
        return
    if config_hash(_IDENTITIES[record["stage"]](examination.configs[run])) == record["config_sha256"]:
        return
    message = f"was run with another configuration than {run}'s"
    if record["package_sha256"] == package_sha256():
        examination.broken(folder, "configuration", message, "restore the configuration, or run the stage again")
    else:
        examination.remark(
            folder,
            "configuration",
            f"{message}, or code that reads it otherwise",
            "audit it with the code that made it",
        )


def _differing(first: Any, second: Any, key: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            item
            for name in {**first, **second}
            for item in _differing(first.get(name), second.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if first == second else [f"{key} {first!r} against {second!r}"]
