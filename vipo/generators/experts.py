"""Two networks as one: one acts at high noise, the other at low (Wan 2.2 A14B)."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Experts(nn.Module):
    """A policy of two networks, of which one or both are trained.

    Each sample is predicted by the network of its own noise level. Where a batch needs both, each sees the whole batch,
    so that a sample's prediction does not depend on its neighbours' levels. A trained one that no sample needs has
    gradients of zero: processes whose samples need others still sum the same gradients. Sharded, whose blocks all
    processes gather or none, those act that a sample of any process needs (`agree`).

    Attributes:
        transformer: for timesteps from `boundary` on.
        transformer_2: for those below.
        boundary: timestep in [0, 1000].
        trained: the names of those that `requires_grad_` concerns.
        acting: which act on a batch, whatever its times, as `vipo plan` counts; None: those that its times ask for.
        agree: what all processes decide, of which act by this one's times.
    """

    def __init__(self, transformer: Any, transformer_2: Any, boundary: float, trained: tuple[str, ...]) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.boundary, self.trained = boundary, trained
        self.acting: Mapping[str, bool] | None = None
        self.agree: Callable[[list[bool]], list[bool]] = list

    @property
    def _no_split_modules(self) -> Any:
        # diffusers' name, for what keeps the blocks of any network whole.
        return self.transformer._no_split_modules

    @property
    def config(self) -> Any:
        """Settings of both but for their names."""
        return self.transformer.config

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """Of the adapters that are trained; without one, empty."""
        found: Mapping[str, Any] = getattr(getattr(self, self.trained[0]), "peft_config", {})
        return found

    def forward(self, hidden_states: Tensor, timestep: Tensor, **given: Any) -> tuple[Tensor]:
        """The prediction of each sample's network, as a tuple of one."""
        high = timestep >= self.boundary
        acting = self.acting
        if acting is None:
            asked = self.agree([bool(high.any()), not bool(high.all())])
            acting = dict(zip(("transformer", "transformer_2"), asked, strict=True))
        made = [
            getattr(self, name)(hidden_states=hidden_states, timestep=timestep, **given)[0]
            for name, acts in acting.items()
            if acts
        ]
        predicted = made[0]
        if len(made) == 2:
            predicted = torch.where(high.view(-1, *[1] * (predicted.ndim - 1)), *made)
        if torch.is_grad_enabled():
            for name, acts in acting.items():
                for value in () if acts else getattr(self, name).parameters():
                    if value.requires_grad:
                        own = value.to_local() if isinstance(value, DTensor) else value
                        # Of a process's rows there may be none, and they may lie in main memory.
                        predicted = predicted + 0 * own.reshape(-1)[:1].sum().to(predicted.device)
        return (predicted,)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Of the trained ones; without gradients, of both."""
        for name in self.trained if requires_grad else ("transformer", "transformer_2"):
            getattr(self, name).requires_grad_(requires_grad)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Of both."""
        self.transformer.enable_gradient_checkpointing()
        self.transformer_2.enable_gradient_checkpointing()

    def enable_adapters(self) -> None:
        """Of the trained ones."""
        for name in self.trained:
            getattr(self, name).enable_adapters()

    def disable_adapters(self) -> None:
        """Of the trained ones."""
        for name in self.trained:
            getattr(self, name).disable_adapters()
