"""Calls without data as a GPU makes them: autocast on CUDA computes in fp32 what it does not on a CPU, and kernels that
CUDA has keep less than the operations that a CPU composes them of.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# Of "CUDA Ops that can autocast to float32" (PyTorch, "Automatic Mixed Precision package") what networks call, by the
# names that functions and tensors' methods have; `rms_norm` and `interpolate` are missing there.
_OF_FP32 = frozenset(
    {
        *("layer_norm", "group_norm", "rms_norm", "normalize", "norm", "interpolate", "softplus", "logsumexp"),
        *("exp", "expm1", "log", "log1p", "log2", "pow", "__pow__", "__rpow__", "reciprocal", "rsqrt", "__rdiv__"),
    }
)
# They read what they are given as it is, and give fp32.
_TO_FP32 = frozenset({"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"})
# Of other types together, a CPU's autocast makes one type of them first; CUDA's leaves it to the operation.
_MIXED = frozenset({"cat", "stack"})
_HALVES = (torch.bfloat16, torch.float16)


def counted_on(device: str) -> AbstractContextManager[Any]:
    """Within it, what a call of tensors without data makes on the CPU is what the call makes on `device`.

    Args:
        device: ``generator.device``.
    """
    return _AsOnCuda() if device.startswith("cuda") else nullcontext()


def backward(loss: Tensor) -> None:
    """Its backward pass, in which what is computed again is counted so as well: PyTorch's own leaves all modes."""
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)


class _AsOnCuda(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, given = getattr(func, "__name__", ""), kwargs or {}
        first = args[0] if args else given.get("input")
        if torch.is_autocast_enabled("cpu"):
            if name in _OF_FP32:
                args, given = tree_map_only(Tensor, _fp32, (args, given))
            elif name in _TO_FP32 and _is_half(first):
                typed = any(isinstance(value, torch.dtype) for value in (*args, *given.values()))
                given = given if typed else {**given, "dtype": torch.float32}
            elif name in _MIXED:
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **given)
        if name == "rms_norm" and isinstance(first, FakeTensor):
            return _rms_norm(*args, **given)
        return func(*args, **given)


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in _HALVES


def _fp32(value: Tensor) -> Tensor:
    return value.float() if _is_half(value) else value


def _rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if weight is not None and weight.dtype != input.dtype:
        return torch.rms_norm(input, normalized_shape, weight, eps)
    normed: Tensor = _FusedRMSNorm.apply(input, len(normalized_shape), weight)
    return normed


class _FusedRMSNorm(torch.autograd.Function):
    """The shapes that ``aten::_fused_rms_norm`` makes, and what it keeps; only CUDA's has a kernel."""

    @staticmethod
    def forward(context: Any, given: Tensor, normed: int, weight: Tensor | None) -> Tensor:
        deviation = given.new_empty(*given.shape[:-normed], *[1] * normed, dtype=torch.float32)
        context.save_for_backward(given, weight, deviation)
        return torch.empty_like(given)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, _ = context.saved_tensors
        needed = context.needs_input_grad
        return (
            torch.empty_like(given) if needed[0] else None,
            None,
            torch.empty_like(weight) if needed[2] else None,
        )
