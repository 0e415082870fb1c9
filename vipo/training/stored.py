"""Tensors of a checkpoint as its files hold them, whole or in the rows of several processes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from vipo.provenance.files import StorageError

ROWS = "rows"
"""Key of a file's metadata: which rows of its tensors it holds."""


class CheckpointError(StorageError):
    """A checkpoint is damaged; the message names the file."""


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in safetensors files, read when they are asked for; pieces of one tensor are put together."""

    def __init__(self, files: Sequence[Path], prefix: str = "") -> None:
        """Find out what lies where.

        Args:
            files: of one checkpoint. One that holds pieces says so in its metadata, key ``rows``: by name the first
                row, the row after the last one, and how many rows the whole tensor has.
            prefix: of the names that are there; it is not part of them.

        Raises:
            CheckpointError: the pieces of a tensor are not the whole of it.
        """
        self._files, self._prefix = files, prefix
        self._pieces: dict[str, list[tuple[int, int, Path]]] = {}
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        total: dict[str, int] = {}
        for file in files:
            with safe_open(file, "pt") as stored:
                rows = json.loads((stored.metadata() or {}).get(ROWS, "{}"))
                for name in filter(lambda name: name.startswith(prefix), stored.keys()):
                    start, stop, total[name] = rows.get(name, (0, 0, 0))
                    self._pieces.setdefault(name, []).append((start, stop, file))
                    part = stored.get_slice(name)
                    shape = tuple(part.get_shape())
                    if name in rows and shape[0] != stop - start:
                        raise CheckpointError(f"{file}: does not hold the rows of {name!r} that it says it holds")
                    whole = (total[name], *shape[1:]) if name in rows else shape
                    if self._shapes.setdefault(name, (part.get_dtype(), whole)) != (part.get_dtype(), whole):
                        raise CheckpointError(f"{file}: the pieces of {name!r} do not fit together")
        for name, pieces in self._pieces.items():
            pieces.sort()
            starts, stops = [piece[0] for piece in pieces], [piece[1] for piece in pieces]
            if starts != [0, *stops[:-1]] or stops[-1] != total[name]:
                raise CheckpointError(f"{files[0].parent}: the pieces of {name!r} are not the whole of it")

    def below(self, prefix: str) -> "StoredTensors":
        """Those whose names begin with ``<prefix>/``, without it."""
        return StoredTensors(self._files, f"{self._prefix}{prefix}/")

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[self._prefix + name]
        if len(pieces) > 1:
            return self.rows(name, 0, pieces[-1][1])
        with safe_open(pieces[0][2], "pt") as stored:
            return stored.get_tensor(self._prefix + name)

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type, as safetensors calls it, and shape of a whole tensor, which is not read."""
        return self._shapes[self._prefix + name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (the one after the last) of a tensor."""
        pieces = self._pieces[self._prefix + name]
        if len(pieces) == 1:
            pieces = [(0, stop, pieces[0][2])]
        found = []
        for first, last, file in pieces:
            if max(start, first) < min(stop, last) or start == stop:
                with safe_open(file, "pt") as stored:
                    part = stored.get_slice(self._prefix + name)
                    found.append(
                        part[max(start, first) - first : min(stop, last) - first] if start < stop else part[:0]
                    )
        return torch.cat(found)

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """The stored tensor as this process holds `tensor`: whole, or the same rows of it."""
        if not isinstance(tensor, DTensor):
            return self[name]
        local, start, _ = own_rows(tensor)
        return DTensor.from_local(
            self.rows(name, start, start + len(local)),
            tensor.device_mesh,
            tensor.placements,
            shape=tensor.shape,
            stride=tensor.stride(),
        )


def own_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """What this process holds of a tensor: its rows, the number of the first one, and how many there are in all.

    FSDP2 gives rank r the r-th of n pieces of ``ceil(rows / n)`` rows. A tensor that is not sharded is held whole.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0, len(tensor) if tensor.ndim else 1
    local, rows = tensor.to_local(), len(tensor)
    piece = -(-rows // tensor.device_mesh.size())
    return local, min(tensor.device_mesh.get_local_rank() * piece, rows), rows
