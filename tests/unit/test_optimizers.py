"""Each optimizer's step by an explicit loop, what it keeps by count, and that it goes on exactly from a checkpoint."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from vipo.config.compose import load_config, repository_root
from vipo.config.optimizer import AdamW8bitConfig, AdamWConfig, NormalisedConfig, OptimizerConfig, SgdConfig
from vipo.config.validation import ConfigError
from vipo.credit.meter.directions import Directions
from vipo.training.checkpoints import (
    CheckpointError,
    check_optimizer,
    load_newest,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    save_checkpoint,
)
from vipo.training.errors import TrainingError
from vipo.training.optimizers import learning_rate, load_optimizer, set_learning_rate

SHAPES = ((64, 128), (3,), (5, 7))
CONFIGS: dict[str, OptimizerConfig] = {
    "adamw": AdamWConfig(learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.95)),
    "adamw_lists": AdamWConfig(learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.95), fused=False),
    "adamw_8bit": AdamW8bitConfig(name="adamw_8bit", learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.95)),
    "sgd": SgdConfig(name="sgd", learning_rate=1e-2, momentum=0.7),
    "normalised": NormalisedConfig(name="normalised", learning_rate=0.3, momentum=0.7),
}


#: bitsandbytes is in no lock: pip install 'vipo[adamw_8bit]'.
HERE = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "adamw_8bit" and not find_spec("bitsandbytes"), reason="absent")
    )
    for name in CONFIGS
]


def _parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def _gradients(number: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=draw) * 10**index for index, shape in enumerate(SHAPES)]


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], number: int) -> None:
    for value, gradient in zip(parameters, _gradients(number), strict=True):
        value.grad = gradient.clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([value.detach().double().numpy().ravel() for value in tensors])


def _by_loop(config: OptimizerConfig, weights: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """All steps, in fp64: the formulas as they are published."""
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for number, gradient in enumerate(gradients, 1):
        if isinstance(config, AdamWConfig | AdamW8bitConfig):
            low, high = config.betas
            first, second = low * first + (1 - low) * gradient, high * second + (1 - high) * gradient**2
            weights = weights * (1 - config.learning_rate * config.weight_decay)
            mean, square = first / (1 - low**number), second / (1 - high**number)
            weights = weights - config.learning_rate * mean / (np.sqrt(square) + 1e-8)
        elif isinstance(config, SgdConfig):
            first = config.momentum * first + gradient
            weights = weights - config.learning_rate * first
        else:
            first = config.momentum * first + (1 - config.momentum) * gradient
            weights = weights - config.learning_rate * first / np.sqrt((first**2).sum())
    return weights


@pytest.mark.parametrize("name", HERE)
def test_steps_are_those_of_the_formula(name: str) -> None:
    parameters = _parameters()
    optimizer, before = load_optimizer(CONFIGS[name], parameters), _flat(parameters)
    for number in (1, 2, 3):
        _step(optimizer, parameters, number)
    expected = _by_loop(CONFIGS[name], before, [_flat(_gradients(number)) for number in (1, 2, 3)])
    moved, apart = np.abs(expected - before).max(), np.abs(_flat(parameters) - expected).max()
    # Moments of 8 bits move a weight a little otherwise.
    assert (1e-4 if name == "adamw_8bit" else 0) <= apart / moved < (0.2 if name == "adamw_8bit" else 1e-4)


def test_a_step_keeps_the_direction_and_a_normalised_one_its_length() -> None:
    gradient = _flat(_gradients(1))
    for name, momentum in (("sgd", 0.0), ("normalised", 0.0), ("normalised", 0.9)):
        parameters = _parameters()
        config = CONFIGS[name].model_copy(update={"momentum": momentum})
        moved = Directions(("optimizer",), dict(enumerate(parameters)), load_optimizer(config, parameters))(
            "optimizer", torch.from_numpy(gradient).float()
        ).double()
        length = float(moved.norm())
        assert float(moved @ torch.from_numpy(gradient)) / length / np.linalg.norm(gradient) == pytest.approx(1)
        assert length == pytest.approx(0.3 if name == "normalised" else 1e-2 * np.linalg.norm(gradient), rel=1e-5)


def test_without_a_gradient_there_is_no_step() -> None:
    parameters = _parameters()
    optimizer, before = load_optimizer(CONFIGS["normalised"], parameters), _flat(parameters)
    optimizer.step()
    parameters[0].grad = torch.zeros(SHAPES[0])
    optimizer.step()
    assert (_flat(parameters) == before).all()


@pytest.mark.parametrize("name", HERE)
def test_it_goes_on_exactly_and_holds_what_is_counted(name: str, tmp_path: Path) -> None:
    config, parameters = CONFIGS[name], _parameters()
    optimizer = load_optimizer(config, parameters)
    for number in (1, 2):
        _step(optimizer, parameters, number)
    state = optimizer_tensors(optimizer)
    held = sum(value.numel() * value.element_size() for value in state.values())
    count = sum(value.numel() for value in parameters)
    # A count of steps each; small tensors are not quantised.
    assert held == pytest.approx(config.state_bytes * count, abs=4 * 3 + 38 * 8)
    weights = {str(index): value for index, value in enumerate(parameters)}
    save_checkpoint(tmp_path, 2, prefixed("network", weights) | prefixed("optimizer", state), {})
    found = load_newest(tmp_path)
    assert found is not None
    stored, restored = found.tensors.below("optimizer"), _parameters()
    fresh = load_optimizer(config, restored)
    check_optimizer(stored, fresh, len(state), "checkpoint 2")
    with torch.no_grad():
        for index, value in enumerate(restored):
            value.copy_(found.tensors.below("network")[str(index)])
    load_optimizer_tensors(fresh, stored)
    forgetful = [nn.Parameter(value.detach().clone()) for value in restored]
    for number in (3, 4):
        _step(optimizer, parameters, number)
        _step(fresh, restored, number)
        _step(load_optimizer(config, forgetful), forgetful, number)
    assert all(torch.equal(a, b) for a, b in zip(parameters, restored, strict=True))
    assert not torch.equal(parameters[0], forgetful[0]), "the state must matter for this test"
    assert optimizer_tensors(optimizer).keys() == optimizer_tensors(fresh).keys()
    other = CONFIGS["sgd" if name.startswith("adamw") else "adamw"]
    with pytest.raises(
        CheckpointError, match=r"damaged \(tensor '\d.(momentum_buffer|exp_avg|exp_avg_sq|step)' is missing"
    ):
        check_optimizer(stored, load_optimizer(other, _parameters()), None, "checkpoint 2")


def test_gradient_descent_without_momentum_keeps_nothing() -> None:
    parameters = _parameters()
    config = SgdConfig(name="sgd")
    optimizer = load_optimizer(config, parameters)
    _step(optimizer, parameters, 1)
    assert optimizer_tensors(optimizer) == {}
    assert config.state_bytes == 0


def test_8_bits_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vipo.training.eight_bit", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(TrainingError, match=r"'adamw_8bit' needs bitsandbytes .*pip install 'vipo\[adamw_8bit\]'"):
        load_optimizer(CONFIGS["adamw_8bit"], _parameters())


def test_files_and_overrides_choose() -> None:
    for path in (repository_root() / "configs" / "optimizer").glob("*.yaml"):
        assert load_config(["experiment=demo", f"optimizer={path.stem}"]).optimizer.name == path.stem
    # The experiment's rate, beside what is the optimizer's own.
    chosen = load_config(["experiment=demo", "optimizer=sgd", "optimizer.momentum=0.5"]).optimizer
    assert chosen == SgdConfig(name="sgd", learning_rate=3e-4, momentum=0.5)
    assert isinstance(load_config(["experiment=demo"]).optimizer, AdamWConfig)
    for overrides, told in (
        (["optimizer=sgd", "optimizer.betas=[0.9, 0.9]"], "optimizer.betas"),
        (["optimizer=adamw_8bit", "distribution.strategy=fsdp"], "blocks of 256 values"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_config(["experiment=demo", *overrides])


def test_the_rate_is_that_of_the_libraries_schedule() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    for schedule, warmup in (("cosine", 0), ("cosine", 4), ("constant", 3), ("constant", 0)):
        config = CONFIGS["sgd"].model_copy(update={"schedule": schedule, "warmup_updates": warmup})
        optimizer = load_optimizer(config, [parameter])
        # They count from 0, and begin their warm-up at a rate of 0.
        make = transformers.get_cosine_schedule_with_warmup if schedule == "cosine" else None
        made = (
            transformers.get_constant_schedule_with_warmup(optimizer, warmup)
            if make is None
            else make(optimizer, warmup, 20)
        )
        rates = []
        for _ in range(20):
            rates.append(made.get_last_lr()[0])
            optimizer.step()
            made.step()
        own = [learning_rate(config, update, 20) for update in range(1, 21)]
        assert own[warmup:] == pytest.approx(rates[warmup:])
        assert own[:warmup] == pytest.approx([1e-2 * (update + 1) / warmup for update in range(warmup)])
        assert config.is_constant == (len(set(own)) == 1)
        set_learning_rate(optimizer, own[0])
        parameter.grad = torch.ones(1)
        before = float(parameter.detach())
        optimizer.step()
        assert before - float(parameter.detach()) == pytest.approx(own[0], rel=1e-3)
        optimizer.zero_grad()


def test_what_never_happens_is_refused() -> None:
    for override, told in (
        ("optimizer.warmup_updates=18", "optimizer.warmup_updates 18 leaves none of the 18 updates"),
        ("evaluation.weights=ema", "needs training.ema_decay"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_config(["experiment=demo", override])
