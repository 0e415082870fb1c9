"""Where a reward's network is while nothing is scored: the one place that moves it."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import nn

from vipo.config.reward_options import Residency

Network = TypeVar("Network", bound=nn.Module)


class Resident(Generic[Network]):
    """A frozen network that is on its device while it is in use.

    A context manager that gives the network. Uses may be nested; what follows the last one is the policy's matter, so
    that a block around many batches moves or reads it once. A gradient through the network must be taken inside.

    Args:
        load: reads the network, in the CPU's memory.
        device: where it computes.
        policy: between uses, ``keep``: it stays there; ``offload``: it is in the CPU's memory; ``free``: it is gone,
            and read again.
    """

    def __init__(self, load: Callable[[], Network], device: str, policy: Residency) -> None:
        self._load, self._device, self._policy = load, device, policy
        self._network: Network | None = None
        self._uses = 0

    def __enter__(self) -> Network:
        network = self._network
        if network is None:
            network = self._load().requires_grad_(False).eval()
        if self._uses == 0:
            network = network.to(self._device)
        self._network = network
        self._uses += 1
        return network

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._uses -= 1
        if self._uses > 0 or self._network is None:
            return
        if self._policy == "offload":
            self._network.to("cpu")
        elif self._policy == "free":
            self._network = None


def in_use(reward: Any) -> AbstractContextManager[Any]:
    """A block in which a reward of vipo's stays on its device; of a reward without a network, nothing."""
    resident = getattr(reward, "resident", None)
    return resident if isinstance(resident, Resident) else contextlib.nullcontext()


def by_network(rewards: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rewards by label, in groups that one use of a network serves; those without one are alone."""
    groups: dict[int | str, dict[str, Any]] = {}
    for label, reward in rewards.items():
        resident = getattr(reward, "resident", None)
        groups.setdefault(id(resident) if isinstance(resident, Resident) else label, {})[label] = reward
    return list(groups.values())
