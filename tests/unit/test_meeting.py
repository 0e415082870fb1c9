"""Where processes do not meet, the message says why: a taken port, one that is missing, a first one that left."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vipo.config.training import DistributionConfig
from vipo.training.distribution import Distribution
from vipo.training.errors import TrainingError
from vipo.training.meetings import Meetings

TWO = DistributionConfig(processes=2, timeout_seconds=2)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A port on which something else listens; the environment is that of rank 0 of two that meet there."""
    with socket.create_server(("", 0)) as taken:
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": taken.getsockname()[1]}).items():
            monkeypatch.setenv(name, str(value))
        yield taken


def test_a_port_that_is_taken_is_named(port: socket.socket) -> None:
    number = os.environ["MASTER_PORT"]
    with pytest.raises(TrainingError, match=rf"127\.0\.0\.1:{number}: in use; .* another MASTER_PORT"):
        Distribution(TWO, "cpu")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_partner_that_does_not_come_is_told(port: socket.socket, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    port.close()
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(TrainingError, match=r"the 2 processes did not find each other at .*\.timeout_seconds 2 \("):
        Distribution(TWO, "cpu")


def test_a_first_process_that_has_left_is_told() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False)
    left = Meetings(TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=60), False), 1, 2, 2)
    with pytest.raises(TrainingError, match=r"rank 0 did not come within distribution\.timeout_seconds 2:"):
        left.meet()
    del store
    with pytest.raises(TrainingError, match="rank 0, through which the processes find each other, is gone"):
        left.meet()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """What processes that ended by themselves have said; here they go on."""
    monkeypatch.setattr("os._exit", lambda status: os.write(2, f"status {status}\n".encode()))
    return lambda: capfd.readouterr().err.splitlines()


class _Counted:
    """Processes whose collectives are the device's, and how many each has asked for."""

    def __init__(self, processes: int, seconds: float) -> None:
        self._server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False)
        self.stores = [self._server.clone() for _ in range(processes)]
        self.asked = [0] * processes
        self.meetings = [
            Meetings(store, rank, processes, seconds, lambda rank=rank: self.asked[rank])
            for rank, store in enumerate(self.stores)
        ]


def test_who_has_asked_for_the_fewest_collectives_is_named_by_who_has_asked_for_more(
    ended: Callable[[], list[str]],
) -> None:
    """Another one that waits too is not, though it has asked for fewer than a third one."""
    them = _Counted(processes=3, seconds=1)
    first, second, third = them.meetings
    with first.named_hangs(), second.named_hangs(), third.named_hangs():
        for meetings in them.meetings:
            meetings.at(3, 1, 2)
        them.asked[:] = [6, 5, 4]
        time.sleep(3)
    told = "rank 2 did not come within distribution.timeout_seconds 1: it hangs, or its node is gone (last seen at "
    assert {*ended()} == {"", f"error: {told}update 3, optimizer step 1, call 2); look at its own messages", "status 1"}


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_pipe_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    them, statuses = _Counted(processes=2, seconds=1), list[int]()

    def broken(number: int, text: bytes) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("os.write", broken)
    monkeypatch.setattr("os._exit", statuses.append)
    with them.meetings[0].named_hangs(), them.meetings[1].named_hangs():
        them.asked[0] = 1
        time.sleep(3)
    assert {*statuses} == {1}


def test_who_asks_in_time_or_has_done_all_is_not_named(ended: Callable[[], list[str]]) -> None:
    them = _Counted(processes=2, seconds=3)
    first, second = them.meetings
    with first.named_hangs():
        with second.named_hangs():
            for number in range(1, 16):
                them.asked[0] = number
                time.sleep(0.3)
                them.asked[1] = number
            # The last look has not seen these.
            them.asked[:] = [16, 16]
        time.sleep(5)
    assert ended() == []


def test_a_lost_connection_is_made_anew(ended: Callable[[], list[str]]) -> None:
    """Else a healthy process would tell no more, and the others name it."""
    them = _Counted(processes=2, seconds=2)

    class Losing:
        """A store whose first clone loses its connection once."""

        def __init__(self) -> None:
            self.clones = 0

        def clone(self) -> Any:
            self.clones += 1
            if self.clones == 1:
                raise dist.DistNetworkError("Connection reset by peer")
            return them.stores[1].clone()

        def __getattr__(self, name: str) -> Any:
            return getattr(them.stores[1], name)

    losing: Any = Losing()
    second = Meetings(losing, 1, 2, 2, lambda: them.asked[1])
    with them.meetings[0].named_hangs(), second.named_hangs():
        for number in range(15):
            them.asked[:] = [number, number]
            time.sleep(0.3)
    assert losing.clones == 2
    assert ended() == []
