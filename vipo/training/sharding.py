"""A network in shards, by PyTorch's FSDP2: cut where it lies, and filled from the one process that has its weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard(network: nn.Module, device: torch.device, processes: int, precision: str) -> None:
    """Leave each process its rows of every parameter; all call it.

    Weights are fp32; with `precision` ``bf16`` they are gathered in bf16 and gradients are reduced in fp32. What is
    gathered at a time, and moved to the device at a time, are the blocks that diffusers keeps whole on one device.
    """
    mesh = init_device_mesh(device.type, (processes,), mesh_dim_names=("data",))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = set(getattr(network, "_no_split_modules", None) or ())
    for module in reversed(list(network.modules())):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def fill(network: nn.Module, device: torch.device, whole: Mapping[str, Tensor]) -> None:
    """Give a sharded network the first process's weights, a tensor at a time; all call it.

    Args:
        network: see `shard`; without weights (on the meta device) or with them.
        device: of this process.
        whole: the network's state before it was sharded, in the first process; empty in the others.
    """
    if any(value.is_meta for value in network.parameters()):
        # Buffers that no state holds are as the class made them.
        buffers = {name: value.clone() for name, value in network.named_buffers()}
        network.to_empty(device=device)
        with torch.no_grad():
            for name, value in buffers.items():
                network.get_buffer(name).copy_(value)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, dict(whole), options=options)
