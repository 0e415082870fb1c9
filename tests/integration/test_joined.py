"""Several transitions in one call of the update: the same gradients as one by one, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_wan22_a14b
from families import FAMILIES
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.config.training import TrainingConfig
from vipo.config.validation import ConfigError
from vipo.errors import VipoError
from vipo.generators import load_generator
from vipo.training.errors import TrainingError
from vipo.training.fit import require_fit
from vipo.training.joined import check_joined
from vipo.training.plan import plan
from vipo.training.setup import Setup, set_up
from vipo.training.update import update

ROOT = repository_root()
LORA = "training.lora={rank: 2, alpha: 2.0}"
COMBINATIONS: dict[str, list[str]] = {
    "kl-window": ["arm=vipo", "objective.kl_weight=0.1", "sampling.window={size: 2, move: random}"],
    "lora-best_of": ["arm=vipo", "objective.kl_weight=0.1", LORA, "training.group_size=8", "training.best_of=4"],
    "steps-guard": ["arm=vipo", "credit.steps=tweedie", "objective.ratio_norm=guard", "training.micro_batch=2"],
    "shared-grpo": ["arm=grpo", "training.transition_choice=shared", "training.epochs=2"],
    "nft": ["arm=nft"],
    "awm": ["arm=awm", LORA],
}


def _setup(results: Path, overrides: list[str], *more: str) -> Setup:
    return set_up(load_config([*overrides, "training.log_ratio_tolerance=1e-3", *more]), ROOT, results / "demo")


def _gradients(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], dict[str, float], list[int]]:
    """Of update 1: the first optimizer step's gradients, the metrics, and the sizes of its calls with gradients."""
    found: dict[str, Tensor] = {}
    sizes: list[int] = []
    step, predict = setup.optimizer.step, setup.generator.predict

    def seen_step() -> None:
        for name, value in setup.trainable.items() if not found else ():
            found[name] = torch.zeros_like(value) if value.grad is None else value.grad.clone()
        step()

    def seen_predict(latents: Tensor, *rest: Any) -> Tensor:
        sizes.extend([len(latents)] if torch.is_grad_enabled() else [])
        return predict(latents, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(setup.optimizer, "step", seen_step)
        patched.setattr(setup.generator, "predict", seen_predict)
        metrics = update(setup, 1)
    return found, metrics, sizes


@pytest.mark.parametrize("name", COMBINATIONS)
def test_joined_gradients_are_those_of_single_calls(
    prepared: Path, tiny_overrides: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5 of the largest: what is left is rounding, for a call of twice the batch is another kernel's."""
    alone, together = (
        _gradients(_setup(prepared, tiny_overrides, *COMBINATIONS[name], *more), monkeypatch)
        for more in ([], ["training.joined_transitions=2"])
    )
    largest = max(float(value.abs().max()) for value in alone[0].values())
    assert largest > 0
    for key, value in alone[0].items():
        assert float((together[0][key] - value).abs().max()) <= 1e-5 * largest, key
    assert len(alone[2]) == 2 * len(together[2])
    assert set(together[2]) == {2 * size for size in set(alone[2])}
    assert alone[1].keys() == together[1].keys()
    for key in ("loss", "grad/norm", "reward/mean"):
        assert together[1][key] == pytest.approx(alone[1][key], rel=1e-3, abs=1e-6), key
    # A policy is compared with what it predicted in the same call: there is no rounding between the two.
    forward = name in ("nft", "awm")
    assert together[1].get("log_ratio/max_before_first_step", 0.0) <= (0 if forward else 1e-4)


def test_beyond_the_tolerance_the_layout_is_named(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["arm=vipo", "training.joined_transitions=2", "training.log_ratio_tolerance=1e-6"]
    setup = _setup(prepared, tiny_overrides, *more)
    predict: Callable[..., Tensor] = setup.generator.predict

    def by_batch(latents: Tensor, *rest: Any) -> Tensor:
        return predict(latents, *rest) + 1e-3 * len(latents)

    monkeypatch.setattr(setup.generator, "predict", by_batch)
    with pytest.raises(TrainingError, match=r"another batch layout: set training\.joined_transitions=1\."):
        update(setup, 1)
    # `rollout_batch` of as many samples gives the update's calls their size.
    same = ["training.micro_batch=2", "training.rollout_batch=4", "training.log_ratio_tolerance=1e-5"]
    setup = _setup(prepared, tiny_overrides, *more, *same)
    predict = setup.generator.predict
    monkeypatch.setattr(setup.generator, "predict", by_batch)
    assert update(setup, 1)["log_ratio/max_before_first_step"] < 1e-5


def test_what_cannot_be_joined_is_refused(tiny_overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="joined_transitions 2 does not divide trained_transitions 3; it may be 1, 3"):
        load_config([*tiny_overrides, "training.trained_transitions=3", "training.joined_transitions=2"])
    config = FAMILIES["wan22_a14b"].config(write_wan22_a14b(tmp_path / "wan"))
    network = load_generator(config, ROOT).network
    check_joined(TrainingConfig(), network)
    with pytest.raises(TrainingError, match="joined_transitions 2: this generator has two networks"):
        check_joined(TrainingConfig(joined_transitions=2), network)


def test_a_plan_counts_the_joined_call(tiny_overrides: list[str]) -> None:
    def of(*more: str) -> Any:
        return plan(load_config([*tiny_overrides, "arm=grpo", *more]), ROOT, 2)

    plain, joined = of("training.micro_batch=2"), of("training.micro_batch=2", "training.joined_transitions=2")
    larger = of("training.micro_batch=4")
    assert joined.phases["learns"] == larger.phases["learns"] > plain.phases["learns"]
    assert joined.phases["rolls out"] == plain.phases["rolls out"] < larger.phases["rolls out"]
    assert (joined.flops, joined.evaluations, joined.held) == (plain.flops, plain.evaluations, plain.held)
    rolled = of("training.micro_batch=2", "training.rollout_batch=4")
    assert rolled.phases["rolls out"] == larger.phases["rolls out"]
    assert rolled.phases["learns"] == plain.phases["learns"]
    config = load_config([*tiny_overrides, "arm=grpo", "training.joined_transitions=2"])
    with pytest.raises(VipoError, match=r"it would fit with training\.joined_transitions=1 \("):
        require_fit(config, ROOT, 2, plan(config, ROOT, 2), of().peak)


# ---- the cut of the gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1e-4, 1e4])
def test_gradients_are_cut_as_pytorch_cuts_them(
    prepared: Path, tiny_overrides: list[str], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, where they are cut and where it would multiply by 1."""
    setup = _setup(prepared, tiny_overrides, "arm=vipo", f"optimizer.max_grad_norm={most}")
    norm, before, after = torch.nn.utils.get_total_norm, list[Tensor](), list[Tensor]()
    norms: list[float] = []

    def seen(values: list[Tensor]) -> Tensor:
        before[:] = [value.clone() for value in values]
        return norm(values)

    def taken() -> None:
        after[:] = [value.grad.clone() for value in setup.trainable.values() if value.grad is not None]
        expected = [torch.nn.Parameter(value) for value in before]
        for parameter, value in zip(expected, before, strict=True):
            parameter.grad = value
        norms.append(float(torch.nn.utils.clip_grad_norm_(expected, most)))
        assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", seen)
    monkeypatch.setattr(setup.optimizer, "step", taken)
    metrics = update(setup, 1)
    assert len(norms) == 2
    assert metrics["grad/norm"] == sum(norms) / 2
    assert all(norm > most for norm in norms) == (most < 1)
    assert math.isfinite(metrics["loss"])
