"""What the environment says of this process's place among others, and what of it is somebody else's."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from vipo.training.errors import TrainingError

log = logging.getLogger(__name__)

# Set together by every launcher; one of the first two alone is a leftover of something else.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What accelerate would take its own counts and plug-ins from: vipo's are in its configuration.
_FOREIGN = (
    "ACCELERATE_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
    "PMI_",
    "OMPI_COMM_WORLD_",
    "MV2_COMM_WORLD_",
)
_FOREIGN_NAMES = frozenset({"FORK_LAUNCHED"})
_LOCAL = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})


@dataclass(frozen=True)
class Place:
    """A process's number among all (`rank` of `size`) and on its node (`local_rank`)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def is_rank() -> bool:
    """Whether this process was started as one of several, by vipo's launcher or another one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def own_place(environment: Mapping[str, str]) -> Place:
    """Where a launcher put this process; alone where RANK and WORLD_SIZE are not both set.

    Raises:
        TrainingError: the variables of several processes are incomplete, no numbers, or contradict each other.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        if stray := [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]:
            log.warning(
                "%s set, but not both RANK and WORLD_SIZE: ignored, this is one process alone", ", ".join(stray)
            )
        return Place()
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not rank < size:
        raise TrainingError(f"RANK {rank} is not below WORLD_SIZE {size}; unset both, or start the processes again")
    if size == 1:
        return Place()
    if missing := [name for name in _PLACE if not environment.get(name)]:
        raise TrainingError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start 'vipo train' without a launcher (it starts "
            f"its processes itself), or unset {', '.join(name for name in _PLACE if name in environment)}"
        )
    if _number(environment, "MASTER_PORT") > 65535:
        raise TrainingError(f"MASTER_PORT {environment['MASTER_PORT']} is no port; they end at 65535")
    return Place(rank, size, _number(environment, "LOCAL_RANK"))


def check_own_gpu(place: Place, device: str) -> None:
    """Refuse a place on a node that has no GPU for it.

    Args:
        place: of one process of several.
        device: ``generator.device``.

    Raises:
        TrainingError: each would take one GPU and there are fewer.
    """
    # Whoever asks for its place alone, as a command's end does, does not import it.
    import torch

    if device == "cuda" and place.local_rank >= (there := torch.cuda.device_count()):
        raise TrainingError(
            f"LOCAL_RANK {place.local_rank}: this node has {there} CUDA devices, and each process takes one; lower "
            "distribution.processes, or look at CUDA_VISIBLE_DEVICES"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise TrainingError(f"{name} {value[:40]!r} in the environment is no whole number; unset it, or mend it")
    return int(value)


def drop_foreign(place: Place) -> None:
    """Take out of this process's environment what makes accelerate another thing than vipo's configuration asks for.

    For good, because accelerate reads some of it at every call. Of a process alone, the ranks' variables go as well.
    """
    for name in list(os.environ):
        alone = place.size == 1 and name in _LOCAL
        if alone or name.startswith(_FOREIGN) or name in _FOREIGN_NAMES:
            del os.environ[name]
