"""How many of PyTorch's operators an update calls beside its networks: what keeps a device's host busy."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.update_share import Calls, watched
from vipo.tracking.timer import Timer
from vipo.training.setup import Setup
from vipo.training.update import update


class _Part(Timer):
    """Knows in which part of an update the program is, and reads no clock."""

    part = "between"

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        outer, self.part = self.part, part
        try:
            yield
        finally:
            self.part = outer


class _Beside(TorchDispatchMode):
    def __init__(self, calls: Calls, timer: _Part) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self._calls, self._timer = calls, timer

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._calls.inside:
            self.counts[self._timer.part] += 1
        return function(*args, **(kwargs or {}))


def operations_beside_networks(setup: Setup, number: int) -> dict[str, int]:
    """Calls of operators, views included, in update `number`: by part, and ``all`` of them.

    Those within calls of network, decoder, backbone and rewards, and in backward passes, are not counted. A CPU's maps
    ask for fewer than a device's: LAPACK does what there takes a thousand of them.
    """
    timer = _Part(setup.device)
    with watched(setup) as calls, _Beside(calls, timer) as beside:
        update(replace(setup, timer=timer), number)
    return {"all": beside.counts.total(), **beside.counts}
