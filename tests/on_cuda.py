"""What CUDA's own autocast and kernels make of a call, asked without a GPU, of tensors with a device and no data."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def pretend_autocast(patch: pytest.MonkeyPatch) -> None:
    """Let autocast on CUDA be on where there is no GPU."""
    patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    patch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)


class _Attended(TorchFunctionMode):
    """One attention for all devices: which kernel is chosen, a GPU would have to say."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        query, _, value = (*args, *(given[name] for name in ("query", "key", "value") if name in given))[:3]
        rounds = torch.is_autocast_enabled(query.device.type)
        return query.new_zeros(
            *query.shape[:-1], value.shape[-1], dtype=torch.bfloat16 if rounds else query.dtype, requires_grad=True
        )


class _Made(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # From main memory to the device, and the same memory again.
        moved = func is torch.ops.aten._to_copy.default and args[0].device != made.device
        if not moved and func is not torch.ops.aten.detach.default:
            for value in tree_iter(made):
                if isinstance(value, Tensor):
                    self.found[str(value.dtype), tuple(value.shape)] += 1
        return made


def tensors_made(call: Callable[[], object]) -> Counter[tuple[str, tuple[int, ...]]]:
    """How many of each type and shape a call makes, but for what attention makes inside."""
    with _Attended(), _Made() as made:
        call()
    return made.found
