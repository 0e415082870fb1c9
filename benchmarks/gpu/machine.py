"""What the machine itself can do: the ceiling that every other figure is read against."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.record import Record
from benchmarks.timing import seconds_of


def _products(left: Tensor, right: Tensor, product: Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(left, right, out=product)


def measure_machine(record: Record, device: str, tiny: bool) -> None:
    """TFLOP/s of a square matrix product by dtype, and GB/s of a copy, on random data."""
    target = torch.device(device)
    side, times = (128, 2) if tiny else (8192, 10)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(side, side, device=target).to(dtype) for _ in range(2))
        product = torch.empty(side, side, device=target, dtype=dtype)
        for _ in range(3):
            torch.mm(left, right, out=product)
        seconds = seconds_of(partial(_products, left, right, product, times), target)
        record.put(f"matmul_tflops.{name}", round(2 * side**3 * times / seconds / 1e12, 4))
    source = torch.randn(side * side, device=target)
    copy = torch.empty_like(source)
    copy.copy_(source)
    seconds = seconds_of(lambda: [copy.copy_(source) for _ in range(times)], target)
    record.put("copy_gb_per_second", round(2 * source.nbytes * times / seconds / 1e9, 2))
