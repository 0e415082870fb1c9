"""Networks that are replicated or sharded over NCCL: the same as in one process that has no group."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.correct import SMALL, prepare, start, train_command, wait_for
from benchmarks.gpu.record import Record
from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.training.optimizers import load_optimizer
from vipo.training.setup import Setup, set_up
from vipo.training.sharding import join_alone, shard
from vipo.training.update import update


def measure_processes(record: Record, device: str) -> None:
    """Note how far the weights after two updates are from those of one process: of groups of one by every strategy,
    and where there are several GPUs, of a group of all of them."""
    count = torch.cuda.device_count() if device == "cuda" else 1
    with tempfile.TemporaryDirectory() as name:
        results, chosen = Path(name) / "results", overrides(count, device)
        experiment = prepare(results, chosen)
        expected, _ = trained(set_up(small(chosen), repository_root(), experiment))
        for strategy in GROUPS_OF_ONE:
            measure_alone(record, strategy, chosen, experiment, expected)
        for strategy in ("ddp", "fsdp") if count > 1 else ():
            measure_several(record, strategy, count, chosen, results, expected)
    if count == 1:
        record.put("several", "not run: there is one device")


def overrides(count: int, device: str) -> list[str]:
    """Of the small run: two micro-batches for each of `count` processes, all in one optimizer step."""
    return [
        f"generator.device={device}",
        "training.updates=2",
        "training.optimizer_steps_per_update=1",
        f"training.group_size={2 * count}",
        "training.micro_batch=2",
    ]


def small(chosen: list[str]) -> Config:
    """The small run with `chosen` overrides."""
    return load_config([*SMALL, *chosen])


def _replicated(setup: Setup) -> Setup:
    join_alone(setup.device)
    network: nn.Module = setup.generator.network
    devices = [setup.device.index or 0] if setup.device.type == "cuda" else None
    setup.generator.network = DistributedDataParallel(network, device_ids=devices).eval()
    return setup


def _sharded(setup: Setup) -> Setup:
    join_alone(setup.device)
    network = setup.generator.network
    shard(network, setup.device, 1, setup.config.generator.precision, offload=False)
    trainable = {name: value for name, value in network.named_parameters() if value.requires_grad}
    return replace(setup, trainable=trainable, optimizer=load_optimizer(setup.config.optimizer, trainable.values()))


# vipo itself makes a group of one for `offload` alone; what it does with several processes is done here by hand.
GROUPS_OF_ONE: Mapping[str, tuple[str | None, Callable[[Setup], Setup]]] = MappingProxyType(
    {
        "ddp": (None, _replicated),
        "fsdp": (None, _sharded),
        "fsdp_offload": ("distribution={strategy: fsdp, offload: true}", lambda setup: setup),
    }
)
"""By strategy: an override, and what wraps a run that is set up."""


def measure_alone(
    record: Record, strategy: str, chosen: list[str], experiment: Path, expected: Mapping[str, Tensor]
) -> None:
    """One of `GROUPS_OF_ONE` against `expected` weights.

    Args:
        chosen: see `overrides`.
        experiment: with prompts and embeddings.
    """
    more, wrapped = GROUPS_OF_ONE[strategy]
    try:
        setup = wrapped(set_up(small([*chosen, *([] if more is None else [more])]), repository_root(), experiment))
        record.put(f"{strategy}.backend", dist.get_backend_config())
        found, ratio = trained(setup)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    record.put(f"{strategy}.largest_weight_difference", _largest(found, expected))
    record.put(f"{strategy}.max_log_ratio_before_first_step", ratio)


def measure_several(
    record: Record, strategy: str, count: int, chosen: list[str], results: Path, expected: Mapping[str, Tensor]
) -> None:
    """`vipo train` with a process on each of `count` devices against `expected` weights.

    Args:
        chosen: see `overrides`.
        results: with prompts and embeddings; the run is written beside it.
    """
    spread = [*chosen, f"distribution.processes={count}", f"distribution.strategy={strategy}"]
    config, own = small(spread), results.with_name(strategy)
    shutil.copytree(results, own)
    wait_for({strategy: start(train_command(own, spread), own.with_suffix(".log"))}, own.parent)
    weights = own / config.experiment.name / "runs" / config.run_name / "weights"
    found = {name: value for file in weights.rglob("*.safetensors") for name, value in load_file(file).items()}
    record.put(f"several.{strategy}.processes", count)
    record.put(f"several.{strategy}.largest_weight_difference", _largest(found, expected))


def trained(setup: Setup) -> tuple[dict[str, Tensor], float]:
    """Weights after a run's updates, and the larger max abs log rho before an update's first step."""
    ratios = [
        update(setup, number)["log_ratio/max_before_first_step"]
        for number in range(1, setup.config.training.updates + 1)
    ]
    whole = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()
        for name, value in setup.trainable.items()
    }
    return whole, max(ratios)


def _largest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        raise RuntimeError(f"other weights: {sorted(found.keys() ^ expected.keys())[:3]}")
    return max(float((value - expected[name]).abs().max()) for name, value in found.items())
