"""Padding by reflection whose gradient is repeatable on a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RepeatableReflection(TorchFunctionMode):
    """Within it, padding by reflection is made of slices, with the same values.

    The backward pass of PyTorch's own has no fixed order of its sums on CUDA, where it is an error under
    `deterministic_algorithms`; autoencoders pad so (LTX-2).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.pad:
            return _pad(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:  # noqa: A002
    return reflected(input, pad) if mode == "reflect" else F.pad(input, list(pad), mode, value)


def reflected(values: Tensor, pad: Sequence[int]) -> Tensor:
    """``F.pad(values, pad, mode="reflect")``.

    Args:
        values: any tensor.
        pad: how many before and after, of the last dimension, the one before it, and so on.

    Raises:
        RuntimeError: more than the dimension has beside its edge.
    """
    for place in range(len(pad) // 2):
        dim, (before, after) = -1 - place, pad[2 * place : 2 * place + 2]
        first = values.narrow(dim, 1, before).flip(dim)
        last = values.narrow(dim, values.shape[dim] - 1 - after, after).flip(dim)
        values = torch.cat([first, values, last], dim)
    return values
