"""Numbers that are not finite, and memory that runs out: the run stops, says where, and the last good state stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nurseries
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.memory import OutOfMemory, memory_errors
from vipo.objectives.surrogate import transition_log_ratio
from vipo.rewards import RewardError
from vipo.stages import encode_stage, evaluate_stage, train_stage
from vipo.training.checkpoints import list_checkpoints, load_checkpoint
from vipo.training.errors import TrainingError
from vipo.training.recorded import train_run
from vipo.training.setup import set_up
from vipo.training.update import update

ROOT = repository_root()
RUN = "demo/runs/vipo-s0"


def _poison(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """From its `call`-th call on, log rho is not a number for the second sample of a micro-batch."""
    calls = iter(range(1, 10_000))

    def poisoned(*arguments: Any) -> Tensor:
        value = transition_log_ratio(*arguments)
        return value * torch.tensor([1.0, torch.nan])[:, None, None] if next(calls) >= call else value

    monkeypatch.setattr("vipo.objectives.surrogate.transition_log_ratio", poisoned)


def test_nan_stops_with_the_last_good_checkpoint_and_says_which_batch(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    whole, results = shutil.copytree(prepared, tmp_path / "whole"), shutil.copytree(prepared, tmp_path / "results")
    config = load_config([*tiny_overrides, "arm=vipo", "training.micro_batch=2"])
    counted = set_up(config, ROOT, prepared / "demo")
    calls = 0

    def count(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return transition_log_ratio(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vipo.objectives.surrogate.transition_log_ratio", count)
        update(counted, 1)
    assert calls % 4 == 0
    with pytest.MonkeyPatch.context() as patched:
        # In the third update's last optimizer step, at its very last call.
        _poison(patched, 3 * calls)
        with pytest.raises(TrainingError) as caught:
            train_run(config, ROOT, results / "demo")
    message = str(caught.value)
    assert message.startswith(
        "update 3, optimizer step 2: the gradient is not finite, and so is the loss of transitions ["
    )
    assert message.count(" of '") == 2
    assert "last good state" in message
    newest = list_checkpoints(results / RUN / "checkpoints")[0]
    assert load_checkpoint(newest).update == 2
    # Nothing bad was kept: the same command goes on to the undisturbed run's bytes.
    train_stage(config, ROOT, results)
    train_stage(config, ROOT, whole)
    for name in ("metrics.jsonl", "weights/transformer/diffusion_pytorch_model.safetensors"):
        assert (results / RUN / name).read_bytes() == (whole / RUN / name).read_bytes()


def test_nan_before_the_first_step_names_the_sample(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = set_up(load_config([*tiny_overrides, "arm=vipo", "training.micro_batch=2"]), ROOT, prepared / "demo")
    before = {name: value.detach().clone() for name, value in setup.trainable.items()}
    _poison(monkeypatch, 1)
    with pytest.raises(TrainingError, match=r"update 1: log rho is not finite at .* of transition \d, sample 1 of '"):
        update(setup, 1)
    assert all(torch.equal(value, before[name]) for name, value in setup.trainable.items())


def test_memory_that_runs_out_names_the_settings_that_lower_it(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, forks: Nurseries
) -> None:
    """The real thing: the process may take 64 MiB more than it has when the update begins."""
    results = shutil.copytree(prepared, tmp_path / "results")
    overrides = [*tiny_overrides, "arm=vipo", "training.group_size=128", "training.micro_batch=128"]
    job = {"world": 1, "results": str(results), "overrides": overrides}
    jobs = json.dumps([job | {"memory": 64}, job])
    status, out, shown = forks.run(ROOT / "tests/e2e/ranks.py", jobs, cwd=ROOT)
    assert status == 0, shown
    # And without that limit, it is enough.
    assert out.splitlines() == ["[1]", "[0]"]
    assert "OutOfMemory: update 1: out of memory (" in shown
    for setting in ("training.micro_batch", "training.gradient_checkpointing=true", "training.lora", "strategy=fsdp"):
        assert setting in shown


def test_memory_that_runs_out_elsewhere_names_the_settings_of_that_place(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's own error, for a petabyte, as loading or running the generator would raise it."""
    results = shutil.copytree(prepared, tmp_path / "results")
    config = load_config([*tiny_overrides, "arm=vipo"])

    def too_much(*_: Any, **__: Any) -> None:
        torch.empty(2**50)

    with monkeypatch.context() as patched:
        patched.setattr("vipo.training.setup.load_generator", too_much)
        with pytest.raises(OutOfMemory, match=r"vipo-s0, outside of its updates: .*training\.lora.*strategy=fsdp"):
            train_stage(config, ROOT, results)
    train_stage(config, ROOT, results)
    (results / RUN / "provenance.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("vipo.training.state.load_optimizer_tensors", too_much)
        with pytest.raises(OutOfMemory, match=r"vipo-s0, outside of its updates: .*training\.lora.*strategy=fsdp"):
            train_stage(config, ROOT, results)
    with monkeypatch.context() as patched:
        patched.setattr("vipo.evaluation.sample.sample_ode", too_much)
        with pytest.raises(OutOfMemory, match=r"sample of vipo-s0: out of memory \(.*evaluation\.batch"):
            evaluate_stage(config, ROOT, results)
    with monkeypatch.context() as patched:
        patched.setattr("vipo.generators.embeddings.resolve_class", too_much)
        with pytest.raises(OutOfMemory, match=r"encode: out of memory \(.*cluster\.encode\.memory_mb"):
            encode_stage(config, ROOT, results)


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), memory_errors("update 1", "Buy more"):
        raise RuntimeError("shape mismatch")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()):
        with (
            pytest.raises(OutOfMemory, match=r"update 7: out of memory .*\. Buy more"),
            memory_errors("update 7", "Buy more"),
        ):
            raise error
        # As a reward or a loader wraps it; told once, however many are around.
        with pytest.raises(OutOfMemory, match=r"^inner: out"), memory_errors("outer", ""), memory_errors("inner", ""):
            _wrapped(error)


def _wrapped(error: Exception) -> None:
    try:
        raise error
    except Exception as cause:
        raise RewardError("reward 'x' raised") from cause


def test_a_disk_without_room_is_refused_where_the_run_writes(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is computed; an update that is only measured needs none."""
    results = shutil.copytree(prepared, tmp_path / "results")
    config = load_config([*tiny_overrides, "arm=vipo"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**10))
    with pytest.raises(TrainingError, match=r"vipo-s0: 0 MiB free, about \d+ MiB are needed; free space"):
        train_run(config, ROOT, results / "demo")
    assert not (results / RUN / "metrics.jsonl").exists()
    set_up(config, ROOT, results / "demo", writes=False)
