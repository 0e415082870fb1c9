"""One row of ``tests/families.py``: a tiny checkpoint of a family, and what is special about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vipo.config.generator import GeneratorConfig


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
        family: its name in `generator.family`.
        write: makes the checkpoint in a folder.
        parts: subfolders that hold weights; a fault in one of them is named.
        settings: section `generator`, beside family, path, size and text length.
        gives_levels: whether the stock pipeline tells the scheduler its levels before they are shifted.
        steps: of the compared sample.
        unreached: matches the parameters that have no way to the prediction, so that no gradient can reach them.
        refused: a file, keys that are set in it, and the error that names them.
        misfits: settings that do not fit this checkpoint, and the error that names them.
    """

    family: str
    write: Callable[[Path], Path]
    parts: tuple[str, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    gives_levels: bool = False
    steps: int = 3
    unreached: str = r"\Z."
    refused: tuple[tuple[str, Mapping[str, object], str], ...] = ()
    misfits: tuple[tuple[Mapping[str, object], str], ...] = ()

    def config(self, path: Path, **changes: object) -> GeneratorConfig:
        """Of the checkpoint at `path`."""
        values = {"family": self.family, "path": str(path), "height": 32, "width": 48, "max_sequence_length": 12}
        return GeneratorConfig.model_validate(values | dict(self.settings) | changes)
