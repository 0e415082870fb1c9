"""What an update needs beside its configuration."""

from collections.abc import Sequence
from pathlib import Path

from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.stages import encode_stage, prepare_stage


def prepared_config(overrides: Sequence[str], results: Path) -> Config:
    """The configuration of a run whose prompts and embeddings are then below `results`."""
    config, root = load_config(overrides), repository_root()
    prepare_stage(config, root, results)
    encode_stage(config, root, results)
    return config
