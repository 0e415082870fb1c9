"""Operations of others' networks whose gradient is not repeatable on a GPU, made of such whose is.

The backward passes of PyTorch's own add up in no fixed order on CUDA, so that `deterministic_algorithms` makes them
errors there. On a CPU they are repeatable, and are left as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RepeatableGradients(TorchFunctionMode):
    """Within it, what is computed on a GPU has a repeatable gradient, and the same values.

    Padding by reflection, as LTX-2's autoencoder has it, and sampling between pixels, as RAFT has it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _INSTEAD:
            values = args[0] if args else given["input"]
            func = _INSTEAD[func] if values.is_cuda and values.requires_grad else func
        return func(*args, **given)


def reflected(values: Tensor, pad: Sequence[int]) -> Tensor:
    """``F.pad(values, pad, mode="reflect")``, of slices.

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


class SampledBetween(torch.autograd.Function):
    """``F.grid_sample(values, grid, align_corners=True)`` with zeros around; none of its gradient goes to the grid.

    Values ``(B, C, H, W)`` at ``(B, h, w, 2)`` places in [-1, 1] give ``(B, C, h, w)``.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, grid: Tensor) -> Tensor:
        context.save_for_backward(grid)
        context.sizes = values.shape
        return F.grid_sample(values, grid, align_corners=True)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (grid,) = context.saved_tensors
        batch, channels, height, width = context.sizes
        gradient = gradients[0].flatten(2).transpose(1, 2)
        x, y = ((grid[..., axis].flatten(1) + 1) / 2 * (side - 1) for axis, side in enumerate((width, height)))
        found = gradient.new_zeros(batch, height * width, channels)
        own = torch.arange(batch, device=grid.device)[:, None]
        # The four pixels around a place, each with the area of the rectangle that is opposite.
        for column in (x.floor(), x.floor() + 1):
            for row in (y.floor(), y.floor() + 1):
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside
                pixel = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
                found.index_put_((own, pixel), share[..., None] * gradient, accumulate=True)
        return found.transpose(1, 2).reshape(context.sizes), None


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:  # noqa: A002
    return reflected(input, pad) if mode == "reflect" else F.pad(input, list(pad), mode, value)


def _grid_sample(
    input: Tensor,  # noqa: A002
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    if (mode, padding_mode, align_corners, input.ndim) == ("bilinear", "zeros", True, 4) and not grid.requires_grad:
        sampled: Tensor = SampledBetween.apply(input, grid)
        return sampled
    return F.grid_sample(input, grid, mode, padding_mode, align_corners)


_INSTEAD: Mapping[Callable[..., Any], Callable[..., Tensor]] = MappingProxyType(
    {F.pad: _pad, F.grid_sample: _grid_sample}
)
