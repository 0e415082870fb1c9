"""A stage as several processes of this node."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vipo.config.compose import dump_config
from vipo.config.run import Config
from vipo.config.training import DistributionConfig


def launch_ranks(
    words: Sequence[str], config: Config, results: Path, wait: float, distribution: DistributionConfig
) -> None:
    """Run a command, such as ``train`` or ``evaluate --only sample``, as this node's ranks of `distribution`."""
    from vipo.training.launch import launch

    # A file of their own: one in the results would be another job's as well.
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / f"{config.run_name}.yaml"
        resolved.write_text(dump_config(config), encoding="utf-8")
        files = ["--config", str(resolved), "--results", str(results), "--wait", str(wait)]
        # -P, for the working directory may hold another vipo.
        command = [sys.executable, "-P", "-m", "vipo.cli", *words, *files]
        launch(command, distribution, config.training.threads, words[0])
