"""Configurations validate, and are those that the stages recorded."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vipo.audit.examination import Examination
from vipo.config.compose import load_config, load_config_file
from vipo.config.run import Config
from vipo.config.values import config_hash
from vipo.provenance.dvc import LockedStage
from vipo.provenance.environment import package_sha256
from vipo.provenance.records import PROVENANCE

#: What of a configuration decides a stage's result, as the stage records it.
_IDENTITIES: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "prepare": Config.prompts_identity,
    "encode": Config.embeddings_identity,
    "train": Config.training_identity,
    "sample": Config.sampling_identity,
    "score": Config.evaluation_identity,
    "compare": Config.report_identity,
    "summarize": Config.report_identity,
    "report": Config.report_identity,
}
_DATA = "report/data"
_FILE = re.compile(r"(?P<place>evaluation|runs|configs)/(?P<run>[^/]+)(/config)?\.yaml")


def check_configurations(examination: Examination, locked: Sequence[LockedStage]) -> int:
    """Read and compare every configuration; returns how many there are."""
    found: dict[str, dict[str, Config]] = {"evaluation": {}, "runs": {}, "configs": {}}
    for name in examination.files:
        if match := _FILE.fullmatch(name):
            remedy = "restore it; one that an earlier version wrote is audited with the code that made it"
            with examination.guarded(name, "configuration", remedy):
                config = load_config_file(examination.folder / name)
                if config.run_name != match["run"]:
                    message = f"is of run {config.run_name}, not {match['run']}"
                    examination.broken(name, "configuration", message, "restore it, or run the stage again")
                found[match["place"]][match["run"]] = config
    examination.trained = found["runs"]
    examination.configs = found["runs"] | found["evaluation"]
    for run, config in examination.configs.items():
        _check_run(examination, run, config, found)
    for run in found["configs"].keys() - examination.configs.keys():
        examination.remark(
            f"configs/{run}.yaml", "configuration", "there is no such run here",
            "nothing, while the experiment is not finished; else remove it",
        )  # fmt: skip
    everything = [config for configs in found.values() for config in configs.values()]
    for folder, record in examination.records.items():
        with examination.guarded(f"{folder}/{PROVENANCE}", "configuration"):
            _check_recorded(examination, folder, record, everything)
    examination.reported = _reported(examination, locked, everything)
    return len(everything)


def _check_run(examination: Examination, run: str, config: Config, found: Mapping[str, Mapping[str, Config]]) -> None:
    trained, wanted = found["runs"].get(run), found["configs"].get(run)
    differing = "" if trained is None else _differing(trained.training_identity(), config.training_identity())
    if differing:
        examination.broken(
            f"runs/{run}/config.yaml", "configuration",
            f"is not what {run} was evaluated as: {differing}",
            "restore both, or train and evaluate the run again",
        )  # fmt: skip
    if wanted is not None:
        for identity in (Config.training_identity, Config.evaluation_identity):
            if differing := _differing(identity(wanted), identity(config)):
                examination.remark(
                    f"configs/{run}.yaml", "configuration", f"is not what {run} was made with: {differing}",
                    "the workflow would make this run again; results are judged by the configuration beside them",
                )  # fmt: skip


def _check_recorded(
    examination: Examination, folder: str, record: Mapping[str, Any], everything: Sequence[Config]
) -> None:
    if config_hash(record["config"]) != record["config_sha256"]:
        message = "its configuration is not the one whose hash was recorded beside it"
        examination.broken(f"{folder}/{PROVENANCE}", "configuration", message, "restore it, or run the stage again")
    if record["stage"] not in _IDENTITIES:
        # A measurement of credit is of arms and numbers of its own, which its record has whole.
        return
    run = folder.partition("/")[2]
    # Stages that serve all runs read what all their configurations agree on, or the workflow's first one.
    candidates = [examination.configs[run]] if run in examination.configs else everything
    identity = _IDENTITIES[record["stage"]]
    identities = [identity(config) for config in candidates]
    if any(config_hash(value) == record["config_sha256"] for value in identities):
        return
    differing = _differing(record["config"], identities[0]) if identities else "there is none"
    message = f"was made with another configuration than is here: {differing}"
    if record["package_sha256"] == package_sha256():
        examination.broken(folder, "configuration", message, "restore the configuration, or run the stage again")
    else:
        message += "; or by code that reads it otherwise"
        examination.remark(folder, "configuration", message, "audit it with the code that made it")


def _reported(examination: Examination, locked: Sequence[LockedStage], everything: Sequence[Config]) -> Config | None:
    """The configuration that the report's numbers were made with: the recorded one, or that of dvc.lock's command."""
    record = examination.records.get(_DATA)
    if record is not None:
        return next((c for c in everything if config_hash(c.report_identity()) == record["config_sha256"]), None)
    for stage in locked:
        words = shlex.split(stage.command)
        if words[:2] == ["vipo", "summarize"]:
            with examination.guarded(_DATA, "configuration"):
                return load_config(words[2:])
    return None


def _differing(first: Any, second: Any) -> str:
    return ", ".join(_differences(first, second))


def _differences(first: Any, second: Any, key: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            item
            for name in {**first, **second}
            for item in _differences(first.get(name), second.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if first == second else [f"{key} {first!r} against {second!r}"]
