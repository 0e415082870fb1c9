"""The command's work: which runs are looked at, and commits that are written before."""

from collections.abc import Sequence
from pathlib import Path

from vipo.check.experiment import check_experiment, wanted_once
from vipo.check.line import Line, ok
from vipo.check.pin import pin as write_commits
from vipo.check.weights import commits
from vipo.config.compose import configuration, load_config, repository_root
from vipo.config.run import Config


def check_command(
    overrides: Sequence[str] | None, file: Path | None, results: Path, *, online: bool, pin: Path | None, branch: str
) -> list[Line]:
    """All lines of the experiment that overrides, or of the run that a resolved file, describe.

    Every arm of the experiment is looked at, unless ``arm=`` chooses one.

    Args:
        overrides, file: of the configuration; one of both at most.
        results: folder of all experiments' results.
        online: the hub may be asked.
        pin: file of `configs/` that commits are written into first.
        branch: whose commits.

    Raises:
        ConfigError: both are given, the configuration cannot be composed, or `pin` cannot be edited.
    """
    given, root = list(overrides or ()), repository_root()
    runs, lines = _runs(given, file), list[Line]()
    if pin is not None:
        found, lines = commits(wanted_once(list(runs.values()), root), root, branch, online)
        if found:
            lines.append(ok("pinned", f"{write_commits(pin, found)} commits written into {pin}"))
            runs = _runs(given, file)
    whole = file is None and not _chosen(given)
    return [*lines, *check_experiment(runs, root, results, online=online, whole=whole)]


def _chosen(overrides: Sequence[str]) -> bool:
    return any(text.startswith("arm=") for text in overrides)


def _runs(overrides: list[str], file: Path | None) -> dict[str, Config]:
    first = configuration(overrides, file)
    if file is not None or _chosen(overrides):
        return {first.arm: first}
    return {name: load_config([*overrides, f"arm={name}"]) for name in first.experiment.arms}
