"""What the jobs of a cluster ask for: from the configuration alone."""

from typing import get_args

import pytest

from vipo.config.cluster import Stage, job_resources
from vipo.config.compose import load_config
from vipo.config.validation import ConfigError

DEMO = "experiment=demo"
CUDA = "generator.device=cuda"


def test_the_demo_asks_for_a_core_and_no_gpu() -> None:
    config = load_config([DEMO])
    for stage in get_args(Stage):
        asked = job_resources(config, stage)
        assert (asked["cpus_per_task"], asked["nodes"], asked["cuda"], asked["launch"]) == (1, 1, 0, "")
        assert asked["mem_mb"] == getattr(config.cluster, stage).memory_mb
        assert asked["runtime"] == getattr(config.cluster, stage).runtime_minutes
        # No account, partition or quality of service that nobody named: clusters without accounting refuse them.
        assert not {"slurm_account", "slurm_partition", "qos", "gres", "mpi"} & asked.keys()
        assert asked.get("slurm_extra") == ("--signal=TERM@60" if stage == "train" else None)


def test_gpus_follow_the_device_and_the_processes() -> None:
    config = load_config([DEMO, CUDA, "distribution.processes=8", "training.threads=2"])
    gres = {stage: job_resources(config, stage).get("gres") for stage in get_args(Stage)}
    assert gres == {**dict.fromkeys(get_args(Stage)), "encode": "gpu:1", "train": "gpu:8", "evaluate": "gpu:8"}
    assert job_resources(config, "train")["cpus_per_task"] == 16
    alone = job_resources(
        load_config([DEMO, CUDA, "distribution.processes=8", "cluster.train.gpus=8"]), "train", alone=True
    )
    assert (alone["gres"], alone["cpus_per_task"]) == ("gpu:1", 1)
    assert job_resources(config, "evaluate")["cpus_per_task"] == 16
    assert [stage for stage in get_args(Stage) if job_resources(config, stage)["cuda"]] == [
        "encode", "train", "evaluate"
    ]  # fmt: skip


def test_named_numbers_win() -> None:
    named = ["cluster.train.gpus=3", "cluster.train.cpus=5", "cluster.train.partition=long", "cluster.train.qos=high"]
    asked = job_resources(load_config([DEMO, *named, "cluster.account=chem", "cluster.stop_seconds=0"]), "train")
    assert (asked["gres"], asked["cpus_per_task"], asked["slurm_partition"], asked["qos"]) == (
        "gpu:3",
        5,
        "long",
        "high",
    )
    assert asked["slurm_account"] == "chem"
    assert "slurm_extra" not in asked


def test_several_nodes_start_the_command_once_on_each() -> None:
    config = load_config([DEMO, CUDA, "distribution.processes=4", "distribution.nodes=2"])
    asked = job_resources(config, "train")
    assert (asked["nodes"], asked["tasks"], asked["mpi"]) == (2, 2, "srun")
    assert asked["launch"] == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --cpus-per-task=4 --gres=gpu:4 "
    )
    assert job_resources(config, "evaluate")["nodes"] == 1


def test_a_signal_before_the_job_has_trained_is_refused() -> None:
    limit = [DEMO, "cluster.train.runtime_minutes=10"]
    assert load_config([*limit, "cluster.stop_seconds=539"]).cluster.stop_seconds == 539
    with pytest.raises(ConfigError, match="leave nothing of train"):
        load_config([*limit, "cluster.stop_seconds=540"])
    assert load_config([DEMO, "cluster.stop_seconds=0", "cluster.train.runtime_minutes=1"]).cluster.stop_seconds == 0
