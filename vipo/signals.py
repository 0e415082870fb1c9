"""Signals that ask a process to stop, handled for a while."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def handled(handler: Callable[[int], None], *numbers: signal.Signals) -> Iterator[None]:
    """The block with `handler` called, with its number, for each of these signals; then what was there before.

    In the main thread alone, as Python has it.
    """

    def called(number: int, _frame: FrameType | None) -> None:
        handler(number)

    before = {number: signal.signal(number, called) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
