"""Weights, gradients and optimizer state in main memory, by FSDP2 in one process: the same run, and exactly resumed."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import edit_json
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda._utils import _get_device_index
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from vipo.config.compose import load_config, repository_root
from vipo.config.validation import ConfigError
from vipo.errors import Preempted, VipoError
from vipo.generators.outline import outline
from vipo.generators.sharded import blocks
from vipo.training import run as run_module
from vipo.training import sharding
from vipo.training.fit import require_fit
from vipo.training.plan import evaluation_bytes, plan
from vipo.training.recorded import train_run
from vipo.training.setup import Setup, set_up
from vipo.training.sharding import Gathered, gathered_values
from vipo.training.stored import StoredTensors
from vipo.training.update import update

ROOT = repository_root()
OFFLOADED = "distribution={strategy: fsdp, offload: true}"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _run(results: Path, overrides: list[str]) -> Path:
    train_run(load_config(overrides), ROOT, results / "demo")
    return results / "demo/runs/vipo-s0"


@pytest.mark.parametrize(
    "more",
    [["training.ema_decay=0.5", "objective.kl_weight=0.1"], ["training.lora={rank: 2, alpha: 2}"]],
    ids=["full", "lora"],
)
def test_it_is_the_same_run_and_goes_on_exactly(
    more: list[str], prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [*tiny_overrides, "arm=vipo", "training.updates=3", "training.save_at=[]", *more]
    plain, whole, cut = (Path(shutil.copytree(prepared, tmp_path / name)) for name in ("plain", "whole", "cut"))
    expected, found = _run(plain, chosen), _run(whole, [*chosen, OFFLOADED])
    assert not dist.is_initialized()
    sound = run_module.update

    def stopping(setup: Setup, number: int, *rest: object) -> dict[str, float]:
        metrics = sound(setup, number, *rest)  # type: ignore[arg-type]
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return metrics

    monkeypatch.setattr(run_module, "update", stopping)
    with pytest.raises(Preempted):
        _run(cut, [*chosen, OFFLOADED])
    dist.destroy_process_group()
    monkeypatch.setattr(run_module, "update", sound)
    resumed = _run(cut, [*chosen, OFFLOADED])
    files = sorted(path.relative_to(found) for path in found.rglob("*.safetensors"))
    assert len(files) >= 3
    for file in ("metrics.jsonl", *files):
        assert (resumed / file).read_bytes() == (found / file).read_bytes(), file
    # The norm of the gradient is summed in another order.
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (expected, found)
    ]
    assert rows[0] == [pytest.approx(row, rel=1e-4, abs=1e-7) for row in rows[1]]
    weights = sorted(path.relative_to(expected) for path in (expected / "weights").rglob("*.safetensors"))
    assert weights == [file for file in files if file.parts[0] == "weights"]
    # Optimizer state as well: its checkpoint is one that any number of processes reads.
    stored: list[Any] = [
        StoredTensors(sorted((run / "checkpoints/000003").glob("*.safetensors"))) for run in (expected, found)
    ]
    assert any(name.startswith("optimizer/") for name in stored[0])
    pairs = [tuple(stored), *((load_file(expected / file), load_file(found / file)) for file in weights)]
    for plain_state, moved_state in pairs:
        assert plain_state.keys() == moved_state.keys()
        for name, value in plain_state.items():
            torch.testing.assert_close(moved_state[name], value, atol=1e-6, rtol=1e-4)


def test_what_lies_where(prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU all lies in main memory: what a GPU's process asks FSDP2 for is seen in its calls."""
    asked: list[object] = []
    sound = sharding.fully_shard

    def asking(module: nn.Module, **options: Any) -> object:
        asked.append(options["offload_policy"])
        return sound(module, **options)

    monkeypatch.setattr(sharding, "fully_shard", asking)
    setup = set_up(load_config([*tiny_overrides, "arm=vipo", OFFLOADED]), ROOT, prepared / "demo")
    assert isinstance(setup.generator.network, FSDPModule)
    # Without memory that is pinned, which the CPU has no use for.
    sharded = sum(isinstance(module, FSDPModule) for module in setup.generator.network.modules())
    assert asked == [CPUOffloadPolicy(pin_memory=False)] * sharded
    update(setup, 1)
    held = [*setup.trainable.values(), *(value for state in setup.optimizer.state.values() for value in state.values())]
    rows = [value for value in held if isinstance(value, DTensor)]
    assert len(rows) == 3 * len(setup.trainable)
    assert all(value.to_local().device.type == "cpu" for value in rows)


def test_the_device_of_a_group_of_one_may_have_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the default ``cuda`` has none, which PyTorch refuses to make current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(_get_device_index(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: None)
    for name in ("cuda", "cuda:1"):
        sharding.join_alone(torch.device(name))
    assert current == [0, 1]


def test_a_block_in_a_block_is_gathered_by_itself() -> None:
    """As those of Stable Diffusion's network are: the outer one holds what its inner ones do not."""

    class Inner(nn.Linear):
        pass

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList(Inner(5, 5, bias=False) for _ in range(2))
            self.own = nn.Linear(1, 1, bias=False)

    class Network(nn.Module):
        _no_split_modules = ("Inner", "Outer")

        def __init__(self) -> None:
            super().__init__()
            self.outer, self.rest = Outer(), nn.Linear(4, 4, bias=False)

    assert gathered_values(Network()) == Gathered(4 * 4, 2 * 5 * 5, 4 * 4, 5 * 5)


def test_without_shards_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="offload true needs strategy fsdp, not 'ddp'"):
        load_config(["experiment=demo", "distribution.offload=true"])


def test_the_plan_moves_it_and_offers_it(tiny_overrides: list[str], tiny_generator: Path, tmp_path: Path) -> None:
    deep = shutil.copytree(tiny_generator, tmp_path / "deep", ignore=shutil.ignore_patterns("*.safetensors"))
    edit_json(deep / "transformer" / "config.json", num_single_layers=8)
    saved = ["training.gradient_checkpointing=true", "training.micro_batch=1", "training.lora={rank: 2, alpha: 2}"]
    chosen = [*tiny_overrides, "arm=vipo", *saved, "generator.precision=bf16", f"generator.path={deep}"]
    config = load_config([*chosen, "generator.weights=bf16"])
    plain, moved = (plan(each, ROOT, 2) for each in (config, load_config([*chosen, OFFLOADED])))
    assert plain.main == {}
    assert moved.main == {
        # Shards are fp32, whatever the weights are without them.
        "network": plan(load_config(chosen), ROOT, 2).held["network"],
        "AdamW": plain.held["AdamW"],
        "gradients": 4 * plain.trained,
        "reference": 0,
        "kept policies": 0,
    }
    assert not moved.held.keys() & moved.main.keys()
    # What is in no block in fp32, and the two largest blocks in bf16.
    network = outline(config.generator, ROOT, FakeTensorMode(allow_non_fake_inputs=True), config.training.lora).network
    sizes = sorted(sum(value.numel() for value in block.parameters()) for block in blocks(network))
    assert len(sizes) == 9
    assert moved.held["gathered weights"] == moved.main["network"] - 4 * sum(sizes) + 2 * sum(sizes[-2:])
    assert "in main memory: AdamW" in moved.text(None)
    assert moved.peak < plain.peak
    with pytest.raises(
        VipoError,
        match=r"be slower, with generator\.weights=fp32 distribution\.strategy=fsdp distribution\.offload=true ",
    ):
        require_fit(config, ROOT, 2, plain, moved.peak)
    with pytest.raises(VipoError, match=r"raise distribution\.processes"):
        require_fit(load_config([*chosen, OFFLOADED]), ROOT, 2, moved, 0)


def test_what_training_shards_is_whole_in_an_evaluation(
    tiny_overrides: list[str], tiny_generator: Path, tmp_path: Path
) -> None:
    """Where the weights alone are more than there is, no batch helps."""
    deep = shutil.copytree(tiny_generator, tmp_path / "deep", ignore=shutil.ignore_patterns("*.safetensors"))
    edit_json(deep / "transformer" / "config.json", num_single_layers=18)
    chosen = [*tiny_overrides, "arm=grpo", "training.gradient_checkpointing=true", "training.micro_batch=1"]
    chosen += ["training.group_size=2", "generator.precision=bf16", f"generator.path={deep}"]
    whole, config = load_config(chosen), load_config([*chosen, OFFLOADED])
    plain, moved = (plan(each, ROOT, 2) for each in (whole, config))
    weights = plain.held["network"]
    assert moved.evaluation == plain.evaluation == evaluation_bytes(config, ROOT) > moved.peak
    require_fit(config, ROOT, 2, moved, moved.evaluation)
    with pytest.raises(VipoError, match=r"an evaluation at .* lower evaluation\.batch 16, or the size"):
        require_fit(config, ROOT, 2, moved, moved.evaluation - 1)
    # Rounded, as autocast computes with them.
    alone = evaluation_bytes(load_config([*chosen, "evaluation.batch=1"]), ROOT)
    assert 0.5 * weights < alone < 0.8 * weights
    with pytest.raises(
        VipoError, match=r"an evaluation at .* with evaluation\.batch=1: lower the size, or run the sample"
    ):
        require_fit(config, ROOT, 2, moved, alone - 1)
    exact = load_config([*chosen, "generator.precision=fp32"])
    counted = plan(exact, ROOT, 2)
    assert weights < evaluation_bytes(load_config([*chosen, "generator.precision=fp32", "evaluation.batch=1"]), ROOT)
    with pytest.raises(VipoError, match=r"for it holds the whole network in fp32: .* generator\.precision=bf16, which"):
        require_fit(exact, ROOT, 2, replace(counted, phases={"learns": 0}, held={}), weights)
    lora = load_config([*chosen, "training.lora={rank: 2, alpha: 2}", "generator.weights=bf16", "evaluation.batch=1"])
    found = plan(lora, ROOT, 2)
    assert found.evaluation < 0.8 * weights
    # It would be trained where it is sharded, and not drawn from.
    with pytest.raises(VipoError, match=r"be slower, with .*distribution\.offload=true .* But an evaluation at "):
        require_fit(lora, ROOT, 2, found, plan(load_config([*chosen, OFFLOADED]), ROOT, 2).peak)
