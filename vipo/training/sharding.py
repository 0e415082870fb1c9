"""A network in shards, by PyTorch's FSDP2: cut where it lies, and filled from the one process that has its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vipo.generators.experts import Experts
from vipo.generators.sharded import blocks


def join_alone(device: torch.device) -> None:
    """Make this process a group of one, without which nothing can be sharded; it is there until it is destroyed."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if not dist.is_initialized():
        dist.init_process_group(group_backend(device.type), store=HashStore(), rank=0, world_size=1)


def group_backend(device: str) -> str:
    """What processes on such devices talk by: values on the CPU, such as a signal's number, must not wait for a GPU."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


def shard(network: nn.Module, device: torch.device, processes: int, precision: str, *, offload: bool) -> None:
    """Leave each process its rows of every parameter; all call it.

    Weights are fp32; with `precision` ``bf16`` blocks are gathered in bf16 and gradients are reduced in fp32. What is
    gathered at a time, and moved to the device at a time, are the `blocks`. What is given to the network, and from one
    block to the next, keeps its type: noise levels and rotary angles in bf16 are others.

    Args:
        network: see `fill`.
        device: of this process.
        processes: of all.
        precision: ``generator.precision``.
        offload: hold rows and their gradients in main memory, where the optimizer steps.
    """
    mesh = init_device_mesh(device.type, (processes,), mesh_dim_names=("data",))
    plain = policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    if isinstance(network, Experts):
        network.agree = _of_any_process
    parts = blocks(network)
    for module in parts:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=place)
    if network not in parts:
        # The embeddings of time and the norms at both ends, which autocast keeps in fp32.
        fully_shard(network, mesh=mesh, mp_policy=plain, offload_policy=place)


def _of_any_process(each: list[bool]) -> list[bool]:
    flags = torch.tensor(each, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


@dataclass(frozen=True)
class Gathered:
    """How many values a device holds whole while a sharded network computes.

    Attributes:
        rest: in no block: from the first call to the end of the backward pass.
        blocks: of one, and the next one, which is fetched meanwhile: at most the two largest.
        rest_trained: of `rest`, those with a gradient.
        block_trained: the most that have one in a block.
    """

    rest: int
    blocks: int
    rest_trained: int
    block_trained: int


def gathered_values(network: nn.Module) -> Gathered:
    """What a device holds whole; a block in a block is gathered by itself."""
    known: set[nn.Parameter] = set()
    units = []
    for module in [*blocks(network), network]:
        units.append([value for value in module.parameters() if value not in known])
        known.update(units[-1])
    *sizes, rest = [sum(value.numel() for value in unit) for unit in units]
    *trained, rest_trained = [sum(value.numel() for value in unit if value.requires_grad) for unit in units]
    return Gathered(rest, sum(sorted(sizes)[-2:]), rest_trained, max(trained))


def fill(network: nn.Module, device: torch.device, whole: Mapping[str, Tensor], *, offload: bool) -> None:
    """Give a sharded network the first process's weights, a tensor at a time; all call it.

    Args:
        network: see `shard`; without weights (on the meta device) or with them.
        device: of this process.
        whole: the network's state before it was sharded, in the first process; empty in the others.
        offload: as `shard` was given it.
    """
    place = torch.device("cpu") if offload else device
    if any(value.is_meta for value in network.parameters()):
        # Buffers that no state holds are as the class made them.
        buffers = {name: value.clone() for name, value in network.named_buffers()}
        network.to_empty(device=place)
        with torch.no_grad():
            for name, value in buffers.items():
                network.get_buffer(name).copy_(value)
    elif offload:
        _move_buffers(network, place)
    options: Any = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, dict(whole), options=options)
    if offload:
        _move_buffers(network, device)


def _move_buffers(network: nn.Module, device: torch.device) -> None:
    # Beside weights in main memory, they are computed with on the device.
    for module in network.modules():
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, value.to(device))


def whole_state(network: nn.Module, *, keep: bool) -> dict[str, Tensor] | None:
    """The whole state of a sharded network on the CPU, empty without `keep`; None of a network that is not sharded.

    All processes call it.
    """
    if not any(isinstance(value, DTensor) for value in network.parameters()):
        return None
    state = {}
    for name, value in network.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.detach().cpu()
    return state
