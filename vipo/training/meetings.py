"""How the processes of a run wait for each other, and how one that does not come is named.

Through the store in which they found each other, not by a collective: a store can say who is missing, and asking it
does not wait for the one that hangs.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from vipo.text import message
from vipo.training.errors import TrainingError

log = logging.getLogger(__name__)

# What the numbers of a place in training count.
_PLACES = ("update", "optimizer step", "call")
# Seconds within which healthy processes notice that another one does not come.
NOTICE = 10.0


class Meetings:
    """Where the processes of a run wait for each other.

    Args:
        store: None of a process alone, for which nothing here does anything.
        rank: of this process, of `processes`.
        seconds: ``distribution.timeout_seconds``.
        asked: how many collectives this process has asked its device for, where the host goes on without them and
            therefore sees no error of one that does not end; else None.
    """

    def __init__(
        self, store: Store | None, rank: int, processes: int, seconds: float, asked: Callable[[], int] | None = None
    ) -> None:
        self._store, self._rank, self._processes, self._seconds = store, rank, processes, seconds
        self._asked = asked
        self._held = 0

    def meet(self, longer: float = 0) -> None:
        """Wait until every process is here, for ``timeout_seconds`` and `longer` seconds more.

        Raises:
            TrainingError: some did not come in that time, the message names them; or the first one is gone.
        """
        if self._store is None:
            return
        self._held += 1
        keys = [f"meeting/{self._held}/{rank}" for rank in range(self._processes)]
        try:
            self._store.set(keys[self._rank], "")
            self._store.wait(keys, timedelta(seconds=self._seconds + longer))
            if self._held > 2:
                # Whoever is here has left the meeting before the last one.
                self._store.delete_key(f"meeting/{self._held - 2}/{self._rank}")
        except dist.DistError as error:
            raise self._missing(keys, error) from error

    def at(self, *place: int) -> None:
        """Tell the others how far this process is: numbers that grow, of update, optimizer step and call."""
        if self._store is not None:
            self._store.set(f"place/{self._rank}", json.dumps(place))

    @contextlib.contextmanager
    def named_hangs(self) -> Iterator[None]:
        """Around work whose collectives wait for the other processes without `meet`, as a backward pass does.

        Where a collective is the device's, no exception ends the wait for it: see `_Watch`.

        Raises:
            TrainingError: a collective failed; the message names the processes that did not come.
        """
        try:
            with contextlib.ExitStack() as stack:
                if self._store is not None and self._asked is not None:
                    watch = _Watch(self._store, self._rank, self._processes, self._seconds, self._asked)
                    watch.start()
                    stack.callback(watch.end)
                yield
        except Exception as error:
            # A plug-in's boundary wraps what is raised inside it: a sharded network gathers in the adapter's call.
            cause: BaseException | None = error
            while cause is not None and not _collective(cause):
                cause = cause.__cause__
            if self._store is None or cause is None:
                raise
            # Whoever waited too notices at nearly the same time.
            keys = [f"failed/{rank}" for rank in range(self._processes)]
            with contextlib.suppress(dist.DistError):
                self._store.set(keys[self._rank], "")
                self._store.wait(keys, timedelta(seconds=min(NOTICE, self._seconds)))
            raise self._missing(keys, error) from error

    def _missing(self, keys: Sequence[str], error: Exception) -> TrainingError:
        assert self._store is not None
        try:
            missing = {rank: _place(self._store, rank) for rank, key in enumerate(keys) if not self._store.check([key])}
        except dist.DistError:
            return TrainingError(
                f"rank 0, through which the processes find each other, is gone ({error}); look at its own messages"
            )
        if not missing:
            return TrainingError(f"the processes lost each other ({error}); look at the network between the nodes")
        return _hanging(missing, self._seconds)


class _Watch(threading.Thread):
    """Ends this process, with the message and status 1, where another one has not asked its device for a collective
    that this one asked for ``timeout_seconds`` ago: the main thread waits in a driver then, where nothing reaches it.
    """

    def __init__(self, store: Store, rank: int, processes: int, seconds: float, asked: Callable[[], int]) -> None:
        """Of process `rank` of `processes`.

        Args:
            store: where they tell each other how many they have asked for.
            seconds: ``distribution.timeout_seconds``.
            asked: how many this one has. A group that does not count says so here.
        """
        super().__init__(name="hangs", daemon=True)
        asked()
        self._store, self._seconds, self._asked = store, seconds, asked
        self._keys, self._own = [f"asked/{each}" for each in range(processes)], f"asked/{rank}"
        self._pause = min(NOTICE, seconds / 4)
        # What another process has told may be that much older than what it has asked for.
        self._before = _Before(seconds + self._pause)
        self._done = threading.Event()

    def run(self) -> None:
        """Tell, and look at what the others tell, until `end`."""
        store: Store | None = None
        while not self._done.wait(self._pause):
            try:
                # The main thread's is locked for as long as a meeting waits.
                store = store or self._store.clone()
                self._look(store)
            except dist.DistError as error:
                # A connection that was lost is made anew; of a store that is gone, launchers and meetings tell.
                log.debug("how far the processes are cannot be told: %s", error)
                store = None

    def _look(self, store: Store) -> None:
        number = self._asked()
        store.set(self._own, str(number))
        due = self._before.see(time.monotonic(), number)
        # Who has not come as far as this is waited for in a meeting.
        if not store.check(self._keys):
            return
        counts = [int(told) for told in store.multi_get(self._keys)]
        # Others may wait for those who asked for the fewest, too.
        fewest = min(counts)
        if fewest < due:
            behind = {rank: _place(store, rank) for rank, count in enumerate(counts) if count == fewest}
            with contextlib.suppress(OSError):
                # A progress bar may stand on the line.
                os.write(2, f"\nerror: {message(str(_hanging(behind, self._seconds)))}\n".encode())
            os._exit(1)

    def end(self) -> None:
        """Look no more. Others may go on for longer than they wait: the last number is told."""
        self._done.set()
        self.join(NOTICE)
        with contextlib.suppress(dist.DistError):
            self._store.set(self._own, str(self._asked()))


class _Before:
    """How large a growing number was some `seconds` before."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: deque[tuple[float, int]] = deque()
        self._then = 0

    def see(self, now: float, number: int) -> int:
        """Take note of the number, and return what it was at least `seconds` ago; 0 if nothing is known of then."""
        self._seen.append((now, number))
        while self._seen[0][0] <= now - self._seconds:
            self._then = self._seen.popleft()[1]
        return self._then


def _hanging(missing: Mapping[int, list[int]], seconds: float) -> TrainingError:
    # Of those, some may only have waited for another a little less long.
    behind = [rank for rank, place in missing.items() if place == min(missing.values())]
    place = ", ".join(f"{name} {number}" for name, number in zip(_PLACES, min(missing.values()), strict=False))
    return TrainingError(
        f"rank {', '.join(map(str, behind))} did not come within distribution.timeout_seconds {seconds:g}: it hangs, "
        f"or its node is gone ({place and 'last seen at '}{place or 'not seen in an update'}); look at its own messages"
    )


def _place(store: Store, rank: int) -> list[int]:
    key = f"place/{rank}"
    return list(json.loads(store.get(key))) if store.check([key]) else []


def _collective(error: BaseException) -> bool:
    # gloo's errors have no type of their own, and the second one of a lost connection does not even name it.
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo", "caused pair closure"))
    return told or isinstance(error, dist.DistError)
