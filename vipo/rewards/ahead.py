"""Questions under way: several at once, and begun before their answers are needed."""

import hashlib
import json
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np

Answer = TypeVar("Answer")


def key_of(levels: np.ndarray[Any, Any], *told: Any) -> bytes:
    """Equal where pictures of 8 bits are, and what is asked of them: values of JSON."""
    text = json.dumps([list(levels.shape), *told], sort_keys=True)
    return hashlib.sha256(text.encode() + b"\0" + levels.tobytes()).digest()


class Ahead(Generic[Answer]):
    """Calls of functions whose answer depends on a key alone.

    Its threads are daemons: a run that is asked to stop does not wait for answers that nobody needs any more.

    Args:
        most: calls at once.
    """

    def __init__(self, most: int) -> None:
        self._queue: SimpleQueue[tuple[Future[Answer], Callable[[], Answer]] | None] = SimpleQueue()
        self._begun: dict[bytes, Future[Answer]] = {}
        for _ in range(most):
            threading.Thread(target=_work, args=(self._queue,), name="reward", daemon=True).start()
        # Not at the interpreter's end, where a thread that wakes up is ended within whatever it calls.
        weakref.finalize(self, _stop, self._queue, most).atexit = False

    def begin(self, key: bytes, call: Callable[[], Answer]) -> None:
        """Start what will be asked for.

        Raises:
            Whatever an earlier one has raised by now: what follows would be in vain.
        """
        for begun in self._begun.values():
            if begun.done() and (error := begun.exception()) is not None:
                self._call_off(self._begun.values())
                raise error
        if key not in self._begun:
            self._begun[key] = self._submitted(call)

    def answers(self, calls: Iterable[tuple[bytes, Callable[[], Answer]]]) -> list[Answer]:
        """What the calls give, in their order; those that were begun are not started again.

        Raises:
            Whatever one of them raises; the others are called off.
        """
        waiting = [self._begun.pop(key) if key in self._begun else self._submitted(call) for key, call in calls]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            self._call_off([*waiting, *self._begun.values()])
            raise

    def _submitted(self, call: Callable[[], Answer]) -> Future[Answer]:
        future: Future[Answer] = Future()
        self._queue.put((future, call))
        return future

    def _call_off(self, futures: Iterable[Future[Answer]]) -> None:
        for each in list(futures):
            each.cancel()
        self._begun.clear()


def _work(queue: "SimpleQueue[tuple[Future[Answer], Callable[[], Answer]] | None]") -> None:
    while (item := queue.get()) is not None:
        future, call = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                # Whoever waits for it gets it.
                future.set_exception(error)


def _stop(queue: "SimpleQueue[tuple[Future[Answer], Callable[[], Answer]] | None]", count: int) -> None:
    for _ in range(count):
        queue.put(None)
