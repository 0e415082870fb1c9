"""Atomic, hashed checkpoints: written beside, fsynced, renamed into place, verified before use.

A checkpoint is a folder ``<root>/<update>/`` with ``tensors.safetensors``, ``state.json`` and
``manifest.json`` (SHA-256 of the two). The rename is the commit: a folder with a number for a name
was complete when it appeared, and the hashes tell whether it still is.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.provenance.files import StorageError, atomic_folder, file_sha256

log = logging.getLogger(__name__)

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class CheckpointError(StorageError):
    """A checkpoint is damaged; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: the number of updates done, its tensors and its JSON state."""

    update: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(root: Path, update: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write checkpoint `update` under `root` atomically.

    Args:
        root: folder of all checkpoints of a run.
        update: number of updates that are done.
        tensors: contiguous CPU or device tensors by name.
        state: JSON-serialisable values.

    Raises:
        StorageError: the disk refused a write; older checkpoints are untouched.
    """
    target = root / f"{update:06d}"
    with atomic_folder(target) as folder:
        # Clones: optimizer and model tensors may share storage, which safetensors refuses.
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, folder / _TENSORS
        )
        (folder / _STATE).write_text(json.dumps(dict(state), indent=1, sort_keys=True) + "\n")
        hashes = {name: file_sha256(folder / name) for name in (_TENSORS, _STATE)}
        (folder / _MANIFEST).write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")
    return target


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Raises:
        CheckpointError: a file is missing or its bytes are not those that were written.
    """
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())
        for name in (_TENSORS, _STATE):
            found = file_sha256(folder / name)
            if found != hashes[name]:
                raise CheckpointError(f"{folder / name}: damaged (SHA-256 {found[:12]}…, written {hashes[name][:12]}…)")
        state = json.loads((folder / _STATE).read_text())
        return Checkpoint(int(folder.name), load_file(folder / _TENSORS), state)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: damaged ({type(error).__name__}: {error})") from error


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.name.isdigit()), key=lambda p: int(p.name), reverse=True)


def load_newest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint under `root`; damaged ones are named in the log and passed over."""
    for folder in list_checkpoints(root):
        try:
            return load_checkpoint(folder)
        except CheckpointError as error:
            log.warning("%s; the checkpoint before it is used", error)
    return None


def prune_checkpoints(root: Path, newest: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `newest`, the one just written.

    One with a higher number was damaged, or the run would have resumed from it: it goes first.
    """
    folders = list_checkpoints(root)
    done = [folder for folder in folders if int(folder.name) <= newest]
    for folder in [*(folder for folder in folders if folder not in done), *done[keep:]]:
        shutil.rmtree(folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as flat tensors named ``<parameter index>.<entry>``."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{entry}": value for index, values in state.items() for entry, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave; the learning rate and the groups stay the optimizer's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with ``prefix/`` before every name."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below ``prefix/``, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
