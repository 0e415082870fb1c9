"""Parts of a stage's work, which wait in files until all are there: each written whole, with a hash of what it holds.

Whoever goes on with a killed stage reads what may have lain there for long: a bit that changed meanwhile leaves a file
that can be read, and would be part of the result.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vipo.provenance.files import atomic_file

_TOLD, _CONTENT, _SHA256 = "part", "content", "sha256"


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, told: Mapping[str, Any] | None = None, key: str = _TOLD
) -> None:
    """Write tensors as a safetensors file.

    Args:
        tensors: contiguous.
        path: of the file.
        told: stands beside the hash in the file's metadata, as JSON under `key`.

    Raises:
        StorageError: the disk refuses.
    """
    write_tensors(tensors, path, {**(told or {}), _SHA256: _tensors_sha256(tensors.items())}, key)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, told: Mapping[str, Any], key: str) -> None:
    """The same without a hash, of a file that no stage goes on with."""
    with atomic_file(path) as temporary:
        # One entry: safetensors writes several in an order that changes from process to process.
        save_file(dict(tensors), temporary, {key: json.dumps(told, sort_keys=True)})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors that `save_tensors` wrote.

    Raises:
        ValueError, LookupError, TypeError, SafetensorError: the file is damaged.
    """
    with safe_open(path, "pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        told = json.loads((stream.metadata() or {})[_TOLD])
    _check(told, _tensors_sha256(tensors.items()))
    return tensors


def names_of(path: Path, key: str, told: Mapping[str, Any]) -> list[str] | None:
    """Names of the tensors in a file that `save_tensors` wrote with `told` under `key`; None: it was told otherwise.

    One that an older vipo wrote, without a hash, is believed: results that were made of it stay.

    Raises:
        As `load_tensors`.
    """
    with safe_open(path, "pt") as stream:
        own, names = json.loads((stream.metadata() or {})[key]), list(stream.keys())
        if {name: value for name, value in own.items() if name != _SHA256} != told:
            return None
        if _SHA256 in own:
            _check(own, _tensors_sha256((name, stream.get_tensor(name)) for name in names))
    return names


def save_json(content: Any, path: Path) -> None:
    """Write what JSON holds, without NaN.

    Raises:
        StorageError: the disk refuses.
    """
    with atomic_file(path) as temporary:
        data = {_CONTENT: content, _SHA256: _json_sha256(content)}
        temporary.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """What `save_json` wrote.

    Raises:
        ValueError, LookupError, TypeError, RecursionError: the file is damaged.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    _check(data, _json_sha256(data[_CONTENT]))
    return data[_CONTENT]


def _check(told: Mapping[str, Any], found: str) -> None:
    if _SHA256 not in told:
        raise ValueError("it has no hash of what it holds, as those of an older vipo")
    if told[_SHA256] != found:
        raise ValueError("it does not hold what was written")


def _tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    # Of each tensor by itself, in the order of their names: a file has an order of its own.
    hashes = {}
    for name, value in tensors:
        raw = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        hashes[name] = [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()
