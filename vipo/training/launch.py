"""Start the processes of one run on this node, and end them together.

`torchrun` and `accelerate launch` can start ``vipo train`` as well. This launcher is there so that nobody has to: it
passes a pre-emption signal on and gives its ranks the time to write their checkpoint, keeps their exit status, and when
one rank dies shows what that one said before what the others say about it.
"""

import contextlib
import json
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from vipo.config.training import DistributionConfig
from vipo.errors import Preempted
from vipo.provenance.lineage import COMMAND, command_line
from vipo.signals import handled
from vipo.training.errors import TrainingError
from vipo.training.rendezvous import rendezvous

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

log = logging.getLogger(__name__)

_LIFELINE = "VIPO_LIFELINE"
# Longer than a rank that lost a partner takes to say so, so that the dead one is known first.
_DELAY = 0.2
# Between nodes, in seconds: how often a launcher looks, how long it tries to reach the others before it ends, and
# longer than ranks that end together are apart, but less than Slurm's KillWait.
_POLL, _CONNECT, _GRACE = 0.5, 10.0, 20.0
_ENDED = "vipo/ended"
_STOPPED = "stopped"
# Of each stage that is launched: what lowers the memory of a rank or of all, and what an end leaves.
_REMEDIES = {"train": "set distribution.strategy=fsdp", "evaluate": "lower distribution.processes"}
_LEFT = {
    "train": "The newest checkpoint is the last good state; start the same command again to go on from it",
    "evaluate": "What is done stays; start the same command again to go on with the rest",
}


def stop_with_launcher() -> None:
    """In a rank: stop as on pre-emption when the launcher is gone, however it ended. Elsewhere: nothing."""
    if _LIFELINE not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        # Nobody reads what this process says any more, and a broken pipe must not end it before its checkpoint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class OtherNodes:
    """What the launchers of a run's nodes tell each other: the first rank of all that ended badly, and how.

    Through the store in which the ranks meet. It lives in rank 0, so that until that one has started nothing can be
    told; where it is gone long before the ranks here have ended, it ended badly.

    Attributes:
        told: what was told first, by this node or another one; None so far.
        several: whether there are other nodes.
    """

    def __init__(self, meeting: Mapping[str, str], config: DistributionConfig) -> None:
        self.told: str | None = None
        self._store: Store | None = None
        self._connected = threading.Event()
        self.several = config.nodes > 1
        if self.several:
            threading.Thread(target=self._listen, args=(dict(meeting), config.timeout_seconds), daemon=True).start()

    def _listen(self, meeting: Mapping[str, str], timeout_seconds: float) -> None:
        # Here, so that a launcher of one node need not load it.
        from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

        try:
            self._store = TCPStore(
                meeting["MASTER_ADDR"],
                int(meeting["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_seconds),
            )
            self._connected.set()
            while not self._store.check([_ENDED]):
                time.sleep(_POLL)
            self.told = self._store.get(_ENDED).decode()
        except DistError as error:
            if self._store is None:
                return
            self._store = None
            time.sleep(_GRACE)
            self.told = f"rank 0, where the ranks meet on {meeting['MASTER_ADDR']}, is gone ({error})"

    def tell(self, message: str) -> str:
        """Tell the other nodes; returns what was told first, which may be another node's message."""
        # A rank may die while the store is not there yet, or this process still loads what reaches it.
        if not self.several or not self._connected.wait(_CONNECT) or self._store is None:
            return message
        from torch.distributed import DistError

        try:
            first = bytes(self._store.compare_set(_ENDED, "", message)).decode()
        except DistError as error:
            log.debug("the other nodes cannot be told: %s", error)
            return message
        # The store may end with this node's ranks: not before the others have looked.
        time.sleep(2 * _POLL)
        return first


def launch(command: Sequence[str], config: DistributionConfig, threads: int = 1, stage: str = "train") -> None:
    """Run `command` as this node's ranks until all have ended well, or one has not.

    Standard error of rank 0 passes through, lines of the others get their rank. SIGTERM, SIGUSR1 and SIGINT reach
    every rank; where one rank alone was asked to stop, the others are asked too. A rank that still waits for the
    others does not listen: it is killed a while after the first one has stopped, and what dies then is no failure.

    Args:
        command: arguments of one rank; RANK, LOCAL_RANK, WORLD_SIZE and the rendezvous come in its environment, with
            what this process was started as (`command_line`) and where it imports from.
        config: section `distribution`.
        threads: of each rank, where OMP_NUM_THREADS does not say how many the libraries may start.
        stage: what the ranks do, by its name in section `cluster`: ``train`` or ``evaluate``; for messages.

    Raises:
        Preempted: the ranks stopped because a signal asked them, or one of them, to.
        TrainingError: a rank of any node ended otherwise; the message names it. The other ranks were killed.
    """
    meeting = rendezvous(config, os.environ)
    first = int(meeting.pop("NODE_RANK")) * config.processes
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    said: queue.Queue[tuple[int, bytes]] = queue.Queue()
    ended: queue.Queue[tuple[int, int]] = queue.Queue()

    def follow(rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        rest = b""
        while piece := os.read(process.stderr.fileno(), 1 << 16):
            # The first rank's as it comes, a progress bar's unfinished line too; of the others whole lines.
            whole = len(piece) if rank == first else piece.rfind(b"\n") + 1
            if whole:
                said.put((rank, rest + piece[:whole]))
            rest = piece[whole:] if whole else rest + piece
        if rest:
            said.put((rank, rest))
        # In the order in which they die: the first one is the cause.
        ended.put((rank, process.wait()))

    asked: list[int] = []

    def forward(number: int) -> None:
        asked.append(number)
        _ask_to_stop(ranks.values(), number)

    def end() -> None:
        for process in ranks.values():
            process.kill()
        for process in ranks.values():
            # So that the run's lock is free for the next start; but not for ever, where a disk holds it up.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)

    with contextlib.ExitStack() as stack:
        stack.enter_context(handled(forward, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        stack.callback(end)
        # Of another launcher, whose agent would keep the store that rank 0 opens here.
        outer = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        for local in range(config.processes):
            own = {
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
                "RANK": str(first + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(config.world_size),
                "LOCAL_WORLD_SIZE": str(config.processes),
                _LIFELINE: "stdin",
                COMMAND: json.dumps(command_line()),
                # The same code, though another working directory's may be nearer.
                "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
            }
            # Nothing is written to standard input: its end tells a rank that this process is gone.
            ranks[first + local] = subprocess.Popen(
                command, env={**outer, **meeting, **own}, stderr=subprocess.PIPE, stdin=subprocess.PIPE
            )
            # A signal that came before this rank did is its signal too.
            for number in asked:
                ranks[first + local].send_signal(number)
        followers = [threading.Thread(target=follow, args=item, daemon=True) for item in ranks.items()]
        for thread in followers:
            thread.start()
        _wait(ranks, said, ended, first, asked, OtherNodes(meeting, config), stage)
        for thread in followers:
            thread.join()


def _wait(
    ranks: Mapping[int, subprocess.Popen[bytes]],
    said: "queue.Queue[tuple[int, bytes]]",
    ended: "queue.Queue[tuple[int, int]]",
    first: int,
    asked: Sequence[int],
    nodes: OtherNodes,
    stage: str,
) -> None:
    left, stopped, failure = set(ranks), False, ""
    # When ranks that outlive one that has stopped are no longer waited for.
    end = math.inf
    while left and time.monotonic() < end:
        pieces = [said.get() for _ in range(said.qsize())]
        time.sleep(_DELAY)
        ends = [ended.get() for _ in range(ended.qsize())]
        # Whoever loses a partner ends with a status: of those that ended since the last look, the one that was killed
        # is the cause, in whatever order this process came to see them.
        bad = None
        for rank, status in sorted(ends, key=lambda end: end[1] >= 0):
            left.discard(rank)
            # A rank that had not begun yet is ended by the signal itself.
            if status == Preempted.STATUS or -status in (signal.SIGTERM, signal.SIGUSR1, *asked):
                if not stopped and not asked:
                    _ask_to_stop(ranks.values())
                    nodes.tell(_STOPPED)
                stopped = True
            elif status != 0:
                bad = bad or (rank, status)
        if nodes.told == _STOPPED and not stopped:
            _ask_to_stop(ranks.values())
            stopped = True
        here = "" if bad is None else _described(bad, ranks, stage)
        if stopped or (asked and (here or nodes.told)):
            # Whoever loses a partner that has stopped dies of that: it is no failure, unless none has stopped.
            failure = failure or here or nodes.told or ""
            end = min(end, time.monotonic() + _GRACE)
        elif here or nodes.told:
            pieces += [said.get() for _ in range(said.qsize())]
            cause = nodes.tell(here) if here else nodes.told
            if bad is not None and cause == here:
                _show([piece for piece in pieces if piece[0] == bad[0]], first)
                pieces = [piece for piece in pieces if piece[0] != bad[0]]
            error = _failed(cause, stage)
            if pieces:
                log.error("%s\nWhat the other ranks said then:", error)
                _show(pieces, first)
            raise error
        _show(pieces, first)
    _show([said.get() for _ in range(said.qsize())], first)
    # Of several nodes, it may be another one's rank that has stopped.
    if stopped or (failure and nodes.several):
        raise Preempted(f"all ranks have stopped. {_LEFT[stage]}")
    if failure:
        raise _failed(failure, stage)


def _ask_to_stop(processes: Iterable[subprocess.Popen[bytes]], number: int = signal.SIGTERM) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _described(bad: tuple[int, int], ranks: Mapping[int, subprocess.Popen[bytes]], stage: str) -> str:
    rank, status = bad
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    if status == -signal.SIGKILL:
        how += f", often by a memory limit: raise cluster.{stage}.memory_mb, or {_REMEDIES[stage]}"
    return f"rank {rank} (process {ranks[rank].pid} on {socket.gethostname()}) {how}"


def _failed(cause: str | None, stage: str) -> TrainingError:
    return TrainingError(f"{cause}; the other ranks were stopped. {_LEFT[stage]}")


def _show(pieces: Sequence[tuple[int, bytes]], first: int) -> None:
    for rank, piece in pieces:
        lines = piece.splitlines(keepends=True)
        sys.stderr.buffer.write(piece if rank == first else b"".join(b"[rank %d] " % rank + line for line in lines))
    sys.stderr.buffer.flush()
