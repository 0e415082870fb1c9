"""Options for speed at real size, one after the other in one process: the same update, the same network."""

import gc
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from benchmarks.gpu.prepared import prepared_config
from benchmarks.gpu.real_size import GIB, note_update
from benchmarks.gpu.record import Record, others_go_on
from benchmarks.gpu.size import Size, family_overrides
from benchmarks.timing import seconds_of
from vipo.config.compose import load_config, repository_root
from vipo.config.validation import ConfigError
from vipo.training.setup import set_up
from vipo.training.update import update

_COMPILED = ("generator.compile=blocks",)
_WITHOUT_RECOMPUTATION = ("training.gradient_checkpointing=false",)

OPTIONS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        # The last one finds the kernels of those before it.
        "sd3_options": (
            "sd3_window",
            {
                "without_recomputation": _WITHOUT_RECOMPUTATION,
                "compiled_without_recomputation": (*_COMPILED, *_WITHOUT_RECOMPUTATION),
                "shared_start": ("sampling.window={size: 2, move: fixed, start: 4, shared_start: true}",),
                "joined": ("training.joined_transitions=2",),
                "second_order": ("sampling.window.solver=dpm2",),
                "larger_rollout": ("training.micro_batch=4", "training.rollout_batch=8"),
                "compiled": _COMPILED,
                "compiled_again": _COMPILED,
            },
        ),
        "flux_options": (
            "flux",
            {
                "without_recomputation": _WITHOUT_RECOMPUTATION,
                "compiled": _COMPILED,
                "native_flash": ("generator.attention=_native_flash",),
                "native_efficient": ("generator.attention=_native_efficient",),
            },
        ),
        "adamw_options": ("sd3_full", {"fused": (), "lists": ("optimizer.fused=false",)}),
    }
)
"""By step: the size, whose own step shows it without any, and Hydra overrides by the name of what they switch."""


def measure_options(record: Record, size: Size, device: str, cases: Mapping[str, tuple[str, ...]]) -> None:
    """Note what an update costs with each of `cases`: start, first update, second update by part, memory, log rho.

    Raises:
        RuntimeError: a case failed, beyond a configuration that this device refuses; the others were measured.
    """
    record.put("setting", size.setting)
    failed = list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # As for the first start on a machine.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        overrides = family_overrides(size, folder, device)
        prepared_config(overrides, folder)
        for case, chosen in cases.items():
            with others_go_on(record, case, failed):
                try:
                    _measure_case(record, case, [*overrides, *chosen], folder, device)
                except ConfigError as error:
                    record.put(f"{case}.refused", str(error)[:500])
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _measure_case(record: Record, case: str, overrides: list[str], folder: Path, device: str) -> None:
    torch._dynamo.reset()
    config, target = load_config(overrides), torch.device(device)
    if target.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(target)
    start = time.perf_counter()
    setup = set_up(config, repository_root(), folder / config.experiment.name, writes=False)
    record.put(f"{case}.set_up_seconds", round(time.perf_counter() - start, 2))
    record.put(f"{case}.first_update_seconds", round(seconds_of(lambda: update(setup, 1), target), 2))
    note_update(record, setup, f"{case}.")
    for value in setup.trainable.values():
        value.grad = torch.zeros_like(value)
    record.put(f"{case}.optimizer_step_seconds", round(seconds_of(setup.optimizer.step, target), 5))
    if target.type == "cuda":
        record.put(f"{case}.memory_gib", round(torch.cuda.max_memory_allocated(target) / GIB, 2))
