"""How folders of results are called."""

from pathlib import Path

from vipo.config.run import Config
from vipo.config.training import EMA


def experiment_folder(config: Config, results: Path) -> Path:
    """``<results>/<experiment>``."""
    return results / config.experiment.name


def run_names(config: Config) -> list[str]:
    """All runs of the experiment, in the order of its arms and seeds."""
    return [f"{name}-s{seed}" for name, arm in config.experiment.arms.items() for seed in arm.seeds]


def checkpoint_label(weights: Path | None) -> str:
    """Name of a checkpoint's folder: ``base``, ``<run>``, ``<run>-u12``, ``<run>-ema``, or that of any other folder."""
    if weights is None:
        return "base"
    folder = weights.resolve()
    if folder.name == EMA:
        return f"{checkpoint_label(folder.parent)}-{EMA}"
    if folder.name == "weights":
        return folder.parent.name
    return f"{folder.parent.parent.name}-u{int(folder.name)}" if folder.parent.name == "updates" else folder.name
