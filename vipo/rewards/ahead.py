"""Questions under way: several at once, and begun before their answers are needed."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Ahead(Generic[Answer]):
    """Calls of functions whose answer depends on a key alone.

    Args:
        most: calls at once.
    """

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="reward")
        self._begun: dict[bytes, Future[Answer]] = {}

    def begin(self, key: bytes, call: Callable[[], Answer]) -> None:
        """Start what will be asked for."""
        if key not in self._begun:
            self._begun[key] = self._pool.submit(call)

    def answers(self, calls: Iterable[tuple[bytes, Callable[[], Answer]]]) -> list[Answer]:
        """What the calls give, in their order; those that were begun are not started again.

        Raises:
            Whatever one of them raises; the others are called off.
        """
        waiting = [self._begun.pop(key, None) or self._pool.submit(call) for key, call in calls]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            for each in (*waiting, *self._begun.values()):
                each.cancel()
            self._begun.clear()
            raise
