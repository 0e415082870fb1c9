"""How often the host waits for the device, and what it asks it for beside the networks."""

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vipo
from benchmarks.gpu.correct import prepared_setup
from benchmarks.gpu.record import Record
from benchmarks.operations import operations_beside_networks
from vipo.training.update import update

_PACKAGE = str(Path(vipo.__file__).parent) + "/"
_READS = ("aten::_local_scalar_dense", "aten::nonzero")
# As PyTorch words it.
_WAITS = "called a synchronizing CUDA operation"


def _line() -> str:
    """Of vipo, the innermost that is being run: ``training/learn.py:90 learn``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (file := frame.f_code.co_filename).startswith(_PACKAGE):
            return f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside vipo"


class HostReads(TorchDispatchMode):
    """Counts, by the line of vipo that asks, the calls that read a value of a tensor: what is told of a CPU.

    On a device it would count tensors in main memory too, and miss copies: see `host_waits`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in _READS:
            self.lines[_line()] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Counts, by the line of vipo that asks, what makes the host wait for a CUDA device within the block.

    That is what PyTorch warns of (values that are read, sizes that must be known, copies that are waited for), and
    `torch.cuda.synchronize`, of which it does not: the timer's.
    """
    lines: Counter[str] = Counter()
    synchronize, before = torch.cuda.synchronize, torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def noted(message: Warning | str, *given: Any, **more: Any) -> None:
            if _WAITS in str(message):
                lines[_line()] += 1
            else:
                show(message, *given, **more)

        def synchronized(*given: Any, **more: Any) -> None:
            lines[_line()] += 1
            with warnings.catch_warnings(action="ignore"):
                synchronize(*given, **more)

        with patch.object(warnings, "showwarning", noted), patch.object(torch.cuda, "synchronize", synchronized):
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield lines
            finally:
                torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _counted(device: str) -> Iterator[Counter[str]]:
    if torch.device(device).type == "cuda":
        with host_waits() as lines:
            yield lines
    else:
        with HostReads() as reads:
            yield reads.lines


def measure_waits(record: Record, device: str) -> None:
    """Calls that make the host wait, of one update with two and with four micro-batches; on a CPU those that read.
    And all calls of operators beside the networks'."""
    found: dict[int, int] = {}
    beside: dict[int, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        for batches in (2, 4):
            overrides = [
                f"generator.device={device}",
                "training.optimizer_steps_per_update=1",
                f"training.micro_batch={8 // batches}",
            ]
            setup = prepared_setup(Path(name) / str(batches), overrides)
            update(setup, 1)
            with _counted(device) as lines:
                update(setup, 2)
            found[batches] = sum(lines.values())
            record.put(f"host_waits.{batches}_micro_batches", found[batches])
            record.put(f"host_waits.{batches}_micro_batches.lines", dict(lines.most_common()))
            beside[batches] = operations_beside_networks(setup, 3)
            record.put(f"host_operations.{batches}_micro_batches", beside[batches])
    record.put("host_waits.a_micro_batch", (found[4] - found[2]) / 2)
    record.put(
        "host_operations.a_micro_batch", {part: (count - beside[2][part]) / 2 for part, count in beside[4].items()}
    )
