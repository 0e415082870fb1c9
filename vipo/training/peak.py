"""How much of what a call makes is alive at once, counted at each operation."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_bytes(
    mode: AbstractContextManager[Any],
    modules: Iterable[nn.Module],
    known: Iterable[Tensor],
    call: Callable[[], object],
) -> int:
    """The most bytes alive at once of what a call makes: not weights, gradients or what is `known`.

    Args:
        mode: that the call is made in.
        modules: which the call is of.
        known: tensors that are there before it.
        call: what is measured.
    """
    held = [value for module in modules for value in (*module.parameters(), *module.buffers())]
    gradients = [value.grad for value in held if value.grad is not None]
    with mode, _Peak([*known, *held, *gradients]) as seen:
        call()
    return seen.peak


class _Peak(TorchDispatchMode):
    """The most bytes of tensors made within the block that are alive at once; those of `known` are not counted."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = weakref.WeakValueDictionary[int, torch.UntypedStorage]()
        for value in known:
            self._seen[value.untyped_storage()._cdata] = value.untyped_storage()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self._seen:
                continue
            storage = value.untyped_storage()
            self._seen[storage._cdata] = storage
            weakref.finalize(storage, self._gone, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return made

    def _gone(self, size: int) -> None:
        self.now -= size
