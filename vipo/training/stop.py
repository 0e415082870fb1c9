"""Whether a run was asked to stop."""

import signal

from vipo.errors import Preempted
from vipo.training.setup import Setup


class Stop:
    """Whether this run was asked to stop, by a signal to any of its processes."""

    def __init__(self, setup: Setup) -> None:
        self._distribution = setup.distribution
        self._signal = 0

    def remember(self, number: int) -> None:
        """Signal `number` arrived here."""
        self._signal = number

    def if_asked(self, finished: int) -> None:
        """All processes stop at the same place, whichever of them the signal reached.

        Raises:
            Preempted: one of them was asked.
        """
        asked = int(self._distribution.largest(self._signal))
        if asked:
            raise Preempted(
                f"stopped by {signal.Signals(asked).name} after update {finished}; "
                "start the same command again to go on from there"
            )
