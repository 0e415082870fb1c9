"""Atomic, hashed checkpoints: written beside, fsynced, renamed into place, verified before use.

A checkpoint is a folder ``<root>/<update>/`` with its tensors, ``state.json`` and ``manifest.json`` (SHA-256 of the
others). The rename is the commit: a folder with a number for a name was complete when it appeared, and the hashes tell
whether it still is. Tensors lie in ``tensors.safetensors``, or, where several processes hold pieces of them, in one
file a process, each naming the rows that it holds: any other number of processes reads back the rows it needs.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from vipo.config.run import Config
from vipo.provenance.files import atomic_folder, file_sha256, fsync_path, named_write_errors, partial_path
from vipo.training.distribution import Distribution
from vipo.training.optimizers import state_like
from vipo.training.stored import ROWS, CheckpointError, StoredTensors, own_rows

log = logging.getLogger(__name__)

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: the number of updates done, its tensors and its JSON state."""

    update: int
    tensors: StoredTensors
    state: dict[str, Any]


def run_bytes(config: Config, parameters: int, kept: int) -> int:
    """Bytes of a run's folder, at most: its checkpoints and the one that is being written, and the weights it leaves.

    Args:
        config: says how many checkpoints and weights are kept, and what the optimizer keeps.
        parameters: that are trained, in fp32.
        kept: policies that are kept beside them.
    """
    training = config.training
    checkpoint = 4 * (1 + kept) + config.optimizer.state_bytes
    weights = 4 * (1 + len(training.save_at)) * (1 if training.ema_decay is None else 2)
    return round(parameters * (checkpoint * (training.keep_checkpoints + 1) + weights))


def save_checkpoint(
    root: Path,
    update: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    distribution: Distribution | None = None,
) -> Path:
    """Write checkpoint `update` under `root` atomically; several processes call this together.

    Args:
        root: folder of all checkpoints of a run, on a disk that all processes see.
        update: number of updates that are done.
        tensors: by name; of a sharded one each process writes its own rows, of any other the main process all.
        state: JSON-serialisable values; the main process's are written.
        distribution: the processes; None for one.

    Raises:
        StorageError: the disk refused this process a write; older checkpoints are untouched.
    """
    target = root / f"{update:06d}"
    sharded = distribution is not None and any(isinstance(value, DTensor) for value in tensors.values())
    if distribution is None or (distribution.is_main and not sharded):
        with atomic_folder(target) as folder:
            _write_state(folder, state, _write_tensors(folder / _TENSORS, tensors))
    elif sharded:
        name = f"tensors-{distribution.rank:05d}-of-{distribution.processes:05d}.safetensors"
        if distribution.is_main:
            with atomic_folder(target) as folder:
                distribution.meetings.meet()
                mine = _write_tensors(folder / name, tensors)
                hashes = {file: value for found in distribution.everyones(mine) for file, value in found.items()}
                _write_state(folder, state, hashes)
        else:
            distribution.meetings.meet()
            own = {key: value for key, value in tensors.items() if isinstance(value, DTensor)}
            with named_write_errors(target):
                mine = _write_tensors(partial_path(target) / name, own)
                fsync_path(partial_path(target) / name)
            distribution.everyones(mine)
    return target


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    held, rows = {}, {}
    for name, tensor in tensors.items():
        local, start, total = own_rows(tensor)
        if local is not tensor:
            rows[name] = (start, start + len(local), total)
        if local is tensor or len(local):
            # Clones: optimizer and model tensors may share storage, which safetensors refuses.
            held[name] = local.detach().cpu().contiguous().clone()
    save_file(held, file, {ROWS: json.dumps(rows, sort_keys=True)} if rows else None)
    return {file.name: file_sha256(file)}


def _write_state(folder: Path, state: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    (folder / _STATE).write_text(json.dumps(dict(state), indent=1, sort_keys=True) + "\n")
    manifest = {**hashes, _STATE: file_sha256(folder / _STATE)}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verify one checkpoint folder and read its state; its tensors are read when they are asked for.

    Raises:
        CheckpointError: a file is missing, its bytes are not those that were written, or it is no such file.
    """
    try:
        hashes = dict(json.loads((folder / _MANIFEST).read_text()))
        for name, written in hashes.items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder / _MANIFEST}: damaged (names {name!r}, which is no file beside it)")
            # Reading a pipe would wait without end.
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: damaged (it is missing, or no regular file)")
            found = file_sha256(folder / name)
            if found != written:
                raise CheckpointError(f"{folder / name}: damaged (SHA-256 {found[:12]}…, written {written[:12]}…)")
        del hashes[_STATE]
        state = json.loads((folder / _STATE).read_text())
        if not isinstance(state, dict):
            raise CheckpointError(f"{folder / _STATE}: damaged (holds no JSON object)")
        return Checkpoint(int(folder.name), StoredTensors([folder / name for name in sorted(hashes)]), state)
    # A pickle or half a header is safetensors' own error; JSON that is nested too deep, Python's.
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged ({type(error).__name__}: {error})") from error


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.name.isdigit()), key=lambda p: int(p.name), reverse=True)


def load_newest(root: Path, check: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
    """The newest complete checkpoint under `root`; damaged ones are named in the log and passed over.

    Args:
        root: folder of all checkpoints.
        check: raises `CheckpointError` for one whose content cannot be gone on from, although its bytes are those of
            its manifest.
    """
    folders = list_checkpoints(root)
    for folder in folders:
        try:
            found = load_checkpoint(folder)
            if check is not None:
                check(found)
        except CheckpointError as error:
            last = folder == folders[-1]
            log.warning("%s; %s", error, "there is none before it" if last else "the checkpoint before it is used")
        else:
            return found
    return None


def check_state(checkpoint: Checkpoint, kinds: Mapping[str, type]) -> None:
    """Check that entries of the state are there and of a type.

    Raises:
        CheckpointError: one is not; the message names it.
    """
    for key, kind in kinds.items():
        found = checkpoint.state.get(key)
        if not isinstance(found, kind):
            raise CheckpointError(
                f"checkpoint {checkpoint.update}: damaged (its state's {key!r} is {type(found).__name__}, "
                f"not {kind.__name__})"
            )


def check_tensors(stored: StoredTensors, like: Mapping[str, Tensor], what: str) -> None:
    """Check that the tensors are those of `like` by name, type and shape, and finite.

    Args:
        stored: below their prefix.
        like: the whole of them; of a sharded one only the shape is read.
        what: of which checkpoint and part, for the message.

    Raises:
        CheckpointError: one is missing, too many, of another type or shape, or not finite; the message names it.
    """
    for names, problem in ((like.keys() - set(stored), "is missing"), (set(stored) - like.keys(), "does not belong")):
        if names:
            raise CheckpointError(f"{what}: damaged (tensor {min(names)!r} {problem})")
    for name, tensor in like.items():
        kind, shape = stored.described(name)
        if (_KINDS.get(kind), shape) != (tensor.dtype, tuple(tensor.shape)):
            raise CheckpointError(
                f"{what}: damaged (tensor {name!r} is {kind} {shape}, not {tensor.dtype} {tuple(tensor.shape)})"
            )
        if not bool(stored[name].isfinite().all()):
            raise CheckpointError(f"{what}: damaged (tensor {name!r} is not finite)")


def check_optimizer(stored: StoredTensors, optimizer: torch.optim.Optimizer, count: int | None, what: str) -> None:
    """Check that the tensors are state of the optimizer's parameters, as `optimizer_tensors` names them.

    Args:
        stored: below their prefix.
        optimizer: that is to go on with them. A parameter that never had a gradient has no state.
        count: how many tensors there were; None where the checkpoint does not tell.
        what: of which checkpoint, for the message.

    Raises:
        CheckpointError: as `check_tensors`.
    """
    if count is not None and count != len(stored):
        raise CheckpointError(f"{what}: damaged ({len(stored)} tensors of the optimizer, {count} were written)")
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    like: dict[str, Tensor] = {}
    for index in {name.split(".", 1)[0] for name in stored}:
        if not (index.isdecimal() and int(index) < len(parameters)):
            raise CheckpointError(f"{what}: damaged (the optimizer has no parameter {index!r})")
        own = state_like(optimizer, parameters[int(index)])
        like |= {f"{index}.{entry}": tensor for entry, tensor in own.items()}
    check_tensors(stored, like, what)


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


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: StoredTensors) -> None:
    """Restore what `optimizer_tensors` gave; the learning rate and the groups stay the optimizer's own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name in tensors:
        index, entry = name.split(".", 1)
        # The count of steps is one number, whatever the parameter's rows.
        value = tensors[name] if entry == "step" else tensors.like(name, parameters[int(index)])
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with ``prefix/`` before every name; `StoredTensors.below` is the way back."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}
