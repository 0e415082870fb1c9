"""What each part of `vipo base` keeps of its training, and goes on from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.training.checkpoints import (
    Checkpoint,
    check_optimizer,
    check_state,
    check_tensors,
    load_newest,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    prune_checkpoints,
    save_checkpoint,
)

#: Tensors that training changes in place, by name, of each part of what is trained.
Parts = Mapping[str, Mapping[str, Tensor]]


def take_up(
    folder: Path, parts: Parts, optimizer: torch.optim.Optimizer, log: list[dict[str, Any]], called: str
) -> int:
    """Fill `parts`, `optimizer` and `log` from the newest checkpoint of `folder` that can be gone on with.

    Args:
        called: what is trained, for messages about a checkpoint that is passed over.

    Returns:
        The number of steps behind it; 0 where there is none, and nothing is changed.
    """

    def check(checkpoint: Checkpoint) -> None:
        check_state(checkpoint, {"log": list})
        what = f"checkpoint {checkpoint.update} of the {called}"
        for name, tensors in parts.items():
            check_tensors(checkpoint.tensors.below(name), tensors, what)
        moments = checkpoint.tensors.below("optimizer")
        check_optimizer(moments, optimizer, checkpoint.state.get("optimizer_tensors"), what)

    newest = load_newest(folder, check)
    if newest is None:
        return 0
    with torch.no_grad():
        for name, tensors in parts.items():
            saved = newest.tensors.below(name)
            for key, value in tensors.items():
                value.copy_(saved[key])
    load_optimizer_tensors(optimizer, newest.tensors.below("optimizer"))
    log[:] = newest.state["log"]
    return newest.update


def keep(folder: Path, step: int, parts: Parts, optimizer: torch.optim.Optimizer, log: list[dict[str, Any]]) -> None:
    """Save all of it after `step` steps; the two newest checkpoints stay."""
    moments = optimizer_tensors(optimizer)
    tensors: dict[str, Tensor] = {}
    for name, values in {**parts, "optimizer": moments}.items():
        tensors |= prefixed(name, values)
    save_checkpoint(folder, step, tensors, {"log": log, "optimizer_tensors": len(moments)})
    prune_checkpoints(folder, step, keep=2)
