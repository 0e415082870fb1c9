"""An earlier policy beside the trained one: a tensor for each trained parameter, as plain state."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vipo.training.stored import StoredTensors, own_rows


class OldPolicy:
    """Weights that follow the trained ones, and that the network can be evaluated with.

    With LoRA these are the adapter's tensors alone; of a sharded network each process has its own rows.

    Attributes:
        tensors: by the parameter's name, like it; what a checkpoint keeps.
    """

    def __init__(self, network: nn.Module, trainable: Mapping[str, nn.Parameter]) -> None:
        """Start as the policy is.

        Args:
            network: the policy, wrapped or not.
            trainable: its trained parameters by name.
        """
        self._network, self._trainable = network, trainable
        self.tensors: dict[str, Tensor] = {name: value.detach().clone() for name, value in trainable.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """``old <- decay old + (1 - decay) policy``.

        Args:
            decay: 0 (become the policy) to 1 (stay).
        """
        for name, value in self._trainable.items():
            own_rows(self.tensors[name])[0].mul_(decay).add_(own_rows(value.detach())[0], alpha=1 - decay)

    @torch.no_grad()
    def restore(self, stored: StoredTensors) -> None:
        """Become what a checkpoint has."""
        for name, value in self.tensors.items():
            value.copy_(stored.like(name, value))

    @contextlib.contextmanager
    def instead(self) -> Iterator[None]:
        """Within, the network has these weights; nothing in it may keep a graph of the parameters."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Values, not tensors: optimizer, DDP and FSDP2 hold on to the parameters' own memory.
        for name, value in self._trainable.items():
            mine, old = own_rows(value.detach())[0], own_rows(self.tensors[name])[0]
            kept = mine.clone()
            mine.copy_(old)
            old.copy_(kept)
        # FSDP2 leaves the outermost module gathered after a call without gradients: with the other weights.
        for module in self._network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
