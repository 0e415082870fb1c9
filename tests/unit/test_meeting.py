"""Where processes do not meet, the message says why: a taken port, one that is missing, a first one that left."""

import os
import socket
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vipo.config.training import DistributionConfig
from vipo.training.distribution import Distribution
from vipo.training.errors import TrainingError

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
    left: Any = object.__new__(Distribution)
    left.config, left._meetings = TWO, 0
    left._accelerator = SimpleNamespace(num_processes=2, process_index=1)
    left._store = TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=60), False)
    with pytest.raises(TrainingError, match=r"rank 0 did not come within distribution\.timeout_seconds 2:"):
        left.meet()
    del store
    with pytest.raises(TrainingError, match="rank 0, through which the processes find each other, is gone"):
        left.meet()
