"""What the environment says of other processes: a launcher's variables count, leftovers of something else do not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from vipo.config.compose import load_config
from vipo.config.training import DistributionConfig
from vipo.stages import evaluation
from vipo.training.distribution import Distribution
from vipo.training.errors import TrainingError
from vipo.training.launch import rendezvous
from vipo.training.meetings import _collective
from vipo.training.ranks import Place, drop_foreign, is_rank, own_place

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SECOND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEETING}


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """As in a new process: accelerate reads the environment once."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "stray",
    [
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "3", "RANK": "3"},
        {"LOCAL_RANK": "nonsense"},
        {"WORLD_SIZE": "8"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
        {"ACCELERATE_DYNAMO_BACKEND": "no_such", "ACCELERATE_MIXED_PRECISION": "fp8"},
        {"ACCELERATE_TORCH_DEVICE": "meta", "ACCELERATE_DEBUG_MODE": "perhaps"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"FORK_LAUNCHED": "perhaps"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"CUDA_VISIBLE_DEVICES": "nonsense"},
    ],
    ids=lambda stray: ",".join(stray),
)
def test_leftovers_of_other_launchers_make_no_difference(
    no_accelerator: None, monkeypatch: pytest.MonkeyPatch, stray: dict[str, str]
) -> None:
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    distribution = Distribution(DistributionConfig(), "cpu")
    assert (distribution.processes, distribution.rank, distribution.is_main) == (1, 0, True)
    assert distribution.device == torch.device("cpu")
    assert distribution._accelerator.mixed_precision == "no"
    assert PartialState().backend is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": "nonsense"}, "RANK 'nonsense' in the environment is no whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE '-2' in the environment is no whole number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE '9{40}' in the environment"),
        ({"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"LOCAL_RANK": ""}, "WORLD_SIZE is 2, but LOCAL_RANK not set: start 'vipo train' without a launcher"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but MASTER_ADDR, MASTER_PORT not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT 'http' in the environment is no whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT 70000 is no port"),
    ],
)
def test_a_launcher_that_says_half_is_named(changes: dict[str, str], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        own_place(SECOND | changes)


def test_a_launcher_s_place_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_place(SECOND) == Place(1, 2, 1)
    assert own_place({}) == Place(0, 1, 0)
    for name, value in (SECOND | {"ACCELERATE_USE_FSDP": "true"}).items():
        monkeypatch.setenv(name, value)
    assert is_rank()
    drop_foreign(own_place(SECOND))
    assert {name: os.environ[name] for name in SECOND} == SECOND
    assert "ACCELERATE_USE_FSDP" not in os.environ
    # Each process takes a GPU of its own.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrainingError, match="LOCAL_RANK 1: this node has 1 CUDA devices"):
        Distribution(DistributionConfig(processes=2), "cuda")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"SLURM_NODEID": "0"}, r"Slurm step is not whole \(KeyError\('SLURM_NNODES'\)"),
        ({"SLURM_NODEID": "0", "SLURM_NNODES": "two"}, "Slurm step is not whole .*'two'"),
        (MEETING | {"NODE_RANK": "2"}, "NODE_RANK '2' is no whole number below 2"),
        (MEETING | {"NODE_RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT 'x' is no whole number below 65536"),
    ],
)
def test_nodes_whose_environment_is_not_whole_are_told(environment: dict[str, str], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        rendezvous(DistributionConfig(nodes=2), environment)


class _Stop(Exception):
    """Where a test looks no further."""


@pytest.mark.parametrize(("there", "launched"), [(8, 8), (3, 3), (1, None), (0, None)])
def test_an_evaluation_is_as_many_processes_as_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: int, launched: int | None
) -> None:
    found: list[int] = []

    def launch(words: Any, config: Any, results: Any, wait: Any, distribution: DistributionConfig) -> None:
        assert distribution.nodes == 1
        found.append(distribution.processes)
        raise _Stop

    def alone(*_: Any) -> None:
        raise _Stop

    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(evaluation, "launch_ranks", launch)
    monkeypatch.setattr("vipo.determinism.prepare_process", alone)
    monkeypatch.setattr("vipo.generators.configured.check_device", lambda _: None)
    config = load_config(["experiment=demo", "generator.device=cuda", "distribution={processes: 8, nodes: 2}"])
    with pytest.raises(_Stop):
        evaluation._evaluate("sample", alone, config, tmp_path, tmp_path, 0, None, 8)
    assert found == ([] if launched is None else [launched])


def test_a_rank_without_a_gpu_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of another launcher, in training and in an evaluation."""
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("vipo.generators.configured.check_device", lambda _: None)
    config = load_config(["experiment=demo", "generator.device=cuda", "distribution.processes=2"])
    told = "LOCAL_RANK 1: this node has 1 CUDA devices, and each process takes one; lower distribution.processes"
    with pytest.raises(TrainingError, match=told):
        Distribution(config.distribution, "cuda")
    with pytest.raises(TrainingError, match=told):
        evaluation._evaluate("sample", lambda *_: None, config, tmp_path, tmp_path, 0, None, 2)


@pytest.mark.parametrize(
    ("told", "of_partners"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 10000ms", True),
        # What a second sum says where the first one's wait has closed the connection.
        ("Application timeout caused pair closure", True),
        ("shapes cannot be multiplied", False),
    ],
)
def test_a_partner_that_does_not_come_is_told_from_other_errors(told: str, of_partners: bool) -> None:
    assert _collective(RuntimeError(told)) == of_partners
