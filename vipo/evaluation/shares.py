"""A stage's work in parts: shared among processes and jobs, resumed in the middle, put together when all is there.

A part is a file that is there whole or not at all, and holds the same bytes whoever makes it. So a killed stage goes on
with the parts that are missing, and one process ends with the bytes of four.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from vipo.errors import VipoError
from vipo.provenance.files import damaged_part, named_write_errors, replace_folder
from vipo.provenance.locks import run_lock

Part = TypeVar("Part")


class ShareError(VipoError):
    """No such share of a stage's work."""


@dataclass(frozen=True)
class Share:
    """What one of several processes or jobs does of a stage: number `number`, from 1, of `count`."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``2/4``.

        Raises:
            ShareError: it is no such text.
        """
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
        if found is None or int(found[1]) > int(found[2]):
            raise ShareError(f"--share {text!r}: give NUMBER/COUNT, such as 2/4 for the second of four")
        return cls(int(found[1]), int(found[2]))

    def split(self, number: int, count: int) -> "Share":
        """Process `number`, from 0, of the `count` that do this share together."""
        return Share((self.number - 1) * count + number + 1, self.count * count)

    def of(self, parts: Sequence[Part]) -> Sequence[Part]:
        """The parts that are this share's."""
        return parts[self.number - 1 :: self.count]


class Work:
    """Where the parts of one stage's folder wait until all are there.

    Attributes:
        folder: the stage's own.
        parts: the folder of the parts; what other inputs or another configuration made lies elsewhere.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> None:
        """Of the configuration `identity` and hashed `inputs` (`vipo.provenance.hashed`)."""
        text = json.dumps([identity, [entry["sha256"] for entry in inputs]], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = folder
        self._place = folder.with_name(f".{folder.name}.{key}.partial")
        self.parts = self._place / "parts"

    @contextlib.contextmanager
    def shared(self, share: Share, wait: float) -> Iterator[None]:
        """The only process that does this share, for the block.

        Raises:
            RunLocked: another one does it.
            StorageError: the disk refuses.
        """
        with run_lock(self._place / f"share-{share.number}-of-{share.count}", wait_seconds=wait):
            self.parts.mkdir(exist_ok=True)
            yield

    def present(self, names: Iterable[str], opened: Callable[[Path], None]) -> set[str]:
        """Which of the parts are there; a damaged one goes away, to be made again.

        Args:
            names: of parts.
            opened: looks whether a file is whole, and raises what `damaged_part` takes.
        """
        found = set()
        for name in names:
            if (path := self.parts / name).is_file():
                with damaged_part(path):
                    opened(path)
                    found.add(name)
        return found

    def publish(self, target: Path, names: Sequence[str]) -> None:
        """Make the parts the folder `target`, whole, in place of the one that may be there.

        Raises:
            StorageError: the disk refuses.
        """
        wanted = set(names)
        with named_write_errors(target):
            for path in self.parts.iterdir():
                if path.name not in wanted:
                    path.unlink()
            replace_folder(target, self.parts)

    def discard(self) -> None:
        """Remove what waits for this folder, of earlier configurations too."""
        for path in self.folder.parent.glob(f".{self.folder.name}.*.partial"):
            shutil.rmtree(path, ignore_errors=True)
