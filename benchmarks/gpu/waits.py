"""How often the host waits for the device."""

import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.correct import prepared_setup
from benchmarks.gpu.record import Record
from vipo.training.update import update

_HOST_WAITS = ("aten::_local_scalar_dense", "aten::nonzero")


class HostReads(TorchDispatchMode):
    """Counts, by the line of vipo that asks, the calls that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        leaves = isinstance(result, Tensor) and args and isinstance(args[0], Tensor) and args[0].is_cuda
        if name in _HOST_WAITS or (leaves and not result.is_cuda):
            frames = [frame for frame in traceback.extract_stack() if "/vipo/" in frame.filename]
            place = frames[-1] if frames else None
            line = "outside vipo" if place is None else f"{place.filename.rpartition('/vipo/')[2]}:{place.name}"
            self.lines[line] += 1
        return result


def measure_waits(record: Record, device: str) -> None:
    """Calls that make the host wait, of one update with two and with four micro-batches."""
    found: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as name:
        for batches in (2, 4):
            overrides = [
                f"generator.device={device}",
                "training.optimizer_steps_per_update=1",
                f"training.micro_batch={8 // batches}",
            ]
            setup = prepared_setup(Path(name) / str(batches), overrides)
            update(setup, 1)
            with HostReads() as reads:
                update(setup, 2)
            found[batches] = sum(reads.lines.values())
            record.put(f"host_waits.{batches}_micro_batches", found[batches])
            record.put(f"host_waits.{batches}_micro_batches.lines", dict(reads.lines.most_common()))
    record.put("host_waits.a_micro_batch", (found[4] - found[2]) / 2)
