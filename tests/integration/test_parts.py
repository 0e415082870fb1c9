"""Objective, gate and credit source from outside the package: docs/credit.md and docs/objectives.md as they stand."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.credit import CreditError
from vipo.errors import Preempted, VipoError
from vipo.imports import check_imports
from vipo.objectives import ObjectiveError
from vipo.training import run as run_module
from vipo.training.errors import TrainingError
from vipo.training.learn import outcomes_of
from vipo.training.lesson import Place
from vipo.training.setup import Setup, set_up
from vipo.training.state import run_identity
from vipo.training.update import assign_credit, choose_lesson, form_advantages, roll_out, score_samples, update

ROOT = repository_root()
PAGES = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("credit.md", "objectives.md")]
SOURCE = "credit.sources=[{name: 'my_credit:Brightness', power: 2.0}]"
# What each run is: its own overrides beside the demo's, and the words of its metrics that no other has.
RUNS = {
    "source-gate": [SOURCE, "objective.gate={name: 'my_gate:FarAway', bound: 1.0e-5}"],
    "attention": ["credit.sources=[{name: attention}]", "objective.gate={name: 'my_gate:FarAway', bound: 1.0e-5}"],
    "steps": [
        "credit.steps=ode",
        "credit.sources=[{name: contrast}]",
        "objective.gate={name: 'my_gate:FarAway', bound: 1.0e-5}",
    ],
    "objective": [SOURCE, "objective={name: 'my_objective:WeightedMatching', pull: 0.2}"],
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path with the pages' modules under the names that the pages give them."""
    blocks = re.findall(r"Save this as `(\w+)\.py`:\n\n```python\n(.*?)```", "\n".join(PAGES), re.DOTALL)
    assert [name for name, _ in blocks] == ["my_credit", "my_gate", "my_objective"]
    for name, code in blocks:
        assert code.count("\n") < 40
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _config(overrides: list[str], *more: str) -> Config:
    return load_config([*overrides, "training.save_at=[]", "training.updates=2", *more])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("parts")
def test_they_train_and_a_resume_ends_with_the_same_bytes(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_overrides, *RUNS[name])
    check_imports(config)
    whole, cut = shutil.copytree(prepared, tmp_path / "whole"), shutil.copytree(prepared, tmp_path / "cut")
    seen: list[dict[str, float]] = []

    def train(results: Path, until: int) -> None:
        def asked(setup: Setup, number: int, *others: Any) -> dict[str, float]:
            seen.append(update(setup, number, *others))
            if number == until:
                os.kill(os.getpid(), signal.SIGTERM)
            return seen[-1]

        setup = set_up(config, ROOT, results / "demo")
        with monkeypatch.context() as patched:
            patched.setattr(run_module, "update", asked)
            run_module.train(setup, run_identity(setup))

    train(whole, 0)
    with pytest.raises(Preempted):
        train(cut, 1)
    train(cut, 0)
    for file in ("metrics.jsonl", "weights/transformer/diffusion_pytorch_model.safetensors"):
        one, other = (results / "demo/runs/vipo-s0" / file for results in (whole, cut))
        assert one.read_bytes() == other.read_bytes()
    assert seen[:2] == seen[2:]
    assert all(metrics["grad/norm"] > 0 and 0 < metrics["map/entropy"] < 1 for metrics in seen)
    if name == "objective":
        # The policy that sampled is the policy at an update's first step: only the second one drifts from it.
        assert all(0 < metrics["drift"] < 1 for metrics in seen)
        assert not any(key.startswith(("log_ratio/", "clip/")) for key in seen[0])
    else:
        assert all(metrics["log_ratio/max_before_first_step"] == 0 for metrics in seen)
        assert 0 < max(metrics["clip/share"] for metrics in seen) < 1


@pytest.mark.usefixtures("parts")
def test_the_pages_configurations_are_valid(tiny_overrides: list[str]) -> None:
    for page in PAGES:
        for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
            given = OmegaConf.to_container(OmegaConf.create(text))
            assert isinstance(given, dict)
            plain = [
                f"{section}.{key}={_flow(value)}" for section, keys in given.items() if "name" not in keys
                for key, value in keys.items()
            ]  # fmt: skip
            whole = [f"{section}={_flow(keys)}" for section, keys in given.items() if "name" in keys]
            check_imports(load_config([*tiny_overrides, *plain, *whole]))


def _flow(value: Any) -> str:
    """In Hydra's own notation of mappings and lists."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return f"'{value}'" if isinstance(value, str) else str(value)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "credit.sources=[{name: 'my_credit:Brightness', powr: 2}]",
            "^credit.sources.0.powr: .*did you mean 'power'",
        ),
        (
            "objective.gate={name: 'my_gate:FarAway', bound: -1}",
            "^objective.gate.bound: .*greater than 0",
        ),
        ("objective={name: 'my_objective:WeightedMatching', push: 1}", "^objective.push: .*allowed: pull"),
        (
            "objective={name: 'my_gate:FarAway'}",
            "^objective 'my_gate:FarAway': is no class .*Objective",
        ),
        ("objective.gate={name: 'my_credit:Brightness'}", "^gate 'my_credit:Brightness': is no class .*Gate"),
    ],
)
def test_a_wrong_option_or_part_is_told_before_anything_is_computed(
    tiny_overrides: list[str], override: str, told: str
) -> None:
    config = _config(tiny_overrides, override)
    with pytest.raises((ConfigError, ObjectiveError), match=told):
        check_imports(config)


WRONG = """
import torch
from my_credit import Brightness
from my_gate import FarAway
from my_objective import WeightedMatching
from vipo.credit import Weights
from vipo.objectives import Gated, Outcome, Points


class Negative(Brightness):
    def __call__(self, samples):
        return super().__call__(samples) - 10


class Crooked(FarAway):
    def __call__(self, moved):
        return Gated(moved.log_ratio)


class Raising(FarAway):
    def __call__(self, moved):
        return moved.nothing


class NoLoss(WeightedMatching):
    def __call__(self, *given):
        return 0.5


class Many(WeightedMatching):
    def __call__(self, share, points, predictions, advantages):
        return Outcome(predictions.new.flatten(1).mean(dim=1))


class Flat(WeightedMatching):
    def __call__(self, share, points, predictions, advantages):
        return Outcome(predictions.new.detach().mean())


class Elsewhere(WeightedMatching):
    def points(self, share):
        return Points(share.trajectory.clean[:, :, 1:], torch.ones(1))


class Unchecked(WeightedMatching):
    needs = "log_probabilities"


class Listed(WeightedMatching):
    def points(self, share):
        return Points(share.trajectory.clean, [0.5] * len(share.steps))


class Counted(WeightedMatching):
    def __call__(self, share, points, predictions, advantages):
        return Outcome(predictions.new.mean(), metrics={"drift": 0.5})


class Shadowing(WeightedMatching):
    def __call__(self, share, points, predictions, advantages):
        return Outcome(predictions.new.mean(), metrics={"reward/mean": torch.ones(())})


class Unfinished(WeightedMatching):
    def __call__(self, share, points, predictions, advantages):
        return Outcome(predictions.new.mean(), dropped=0.5)


class Halfway(WeightedMatching):
    @property
    def needs_old(self):
        return self.options.nothing


class Boundless(FarAway):
    def __call__(self, moved):
        everywhere = torch.ones_like(moved.advantages)
        return Gated(everywhere.bool(), everywhere * torch.nan)


class Undecided(FarAway):
    def __call__(self, moved):
        return Gated(None)


class Flagged(Brightness):
    def __call__(self, samples):
        return Weights(super().__call__(samples), constant=[False] * len(samples))
"""


@pytest.mark.parametrize(
    ("override", "kind", "told"),
    [
        ("credit.sources=[{name: 'wrong:Negative'}]", CreditError, "^credit source 'wrong:Negative': .* not negative"),
        (
            "objective.gate={name: 'wrong:Crooked'}",
            ObjectiveError,
            "^gate 'wrong:Crooked': dropped: .*torch.bool",
        ),
        ("objective.gate={name: 'wrong:Raising'}", ObjectiveError, "^gate 'wrong:Raising' raised AttributeError"),
        (
            "objective={name: 'wrong:NoLoss'}",
            ObjectiveError,
            "^objective 'wrong:NoLoss': .*Outcome, got a float",
        ),
        (
            "objective={name: 'wrong:Many'}",
            ObjectiveError,
            r"scalar loss .* got torch.float32 of \(4,\)",
        ),
        ("objective={name: 'wrong:Flat'}", ObjectiveError, r"got torch.float32 of \(\) without gradient"),
        (
            "objective={name: 'wrong:Elsewhere'}",
            ObjectiveError,
            r"points: latents: expected .* got torch.float32 of",
        ),
        ("objective={name: 'wrong:Unchecked'}", ObjectiveError, "needs log-probabilities and gives no log_ratio"),
        ("objective={name: 'wrong:Listed'}", ObjectiveError, r"points: times: expected .* of \(4,\), got a list"),
        (
            "objective={name: 'wrong:Counted'}",
            ObjectiveError,
            "'drift': expected a scalar tensor, got a float",
        ),
        ("objective={name: 'wrong:Shadowing'}", ObjectiveError, "'reward/mean' is one of every run's"),
        ("objective={name: 'wrong:Unfinished'}", ObjectiveError, "dropped: expected 4 samples, got a float"),
        ("objective={name: 'wrong:Halfway'}", ObjectiveError, "^objective 'wrong:Halfway' raised AttributeError"),
        ("objective.gate={name: 'wrong:Undecided'}", ObjectiveError, "dropped: expected torch.bool .* got a NoneType"),
        ("objective.gate={name: 'wrong:Boundless'}", TrainingError, "the loss is nan although its gradient is finite"),
        ("credit.sources=[{name: 'wrong:Flagged'}]", CreditError, "^credit source 'wrong:Flagged': .* got a list"),
    ],
)
def test_what_a_part_must_not_give_stops_the_update_before_a_step(
    prepared: Path, tiny_overrides: list[str], parts: Path, override: str, kind: type[VipoError], told: str
) -> None:
    (parts / "wrong.py").write_text(WRONG)
    setup = set_up(_config(tiny_overrides, override), ROOT, prepared / "demo")
    before = {name: value.detach().clone() for name, value in setup.trainable.items()}
    with pytest.raises(kind, match=told):
        update(setup, 1)
    assert all(torch.equal(value, before[name]) for name, value in setup.trainable.items())


WATCHES = '''
import torch
from vipo.credit import CreditSource


class Watches(CreditSource):
    """Notes the velocity of each step while it is predicted."""

    def set_up(self, context):
        self.steps = len(context.prompts) and 4

    def before_rollout(self, generator, prompts):
        self.found = []
        self.hook = generator.network.register_forward_hook(lambda *given: self.found.append(1.0 + len(self.found)))

    def after_rollout(self, generator):
        self.hook.remove()
        return self.found

    def __call__(self, samples):
        assert [len(found) for found in samples.seen] == [self.steps] * len(samples.trajectories)
        shape = (len(samples), self.steps - 1, *samples.positions)
        return torch.tensor(samples.seen[0][:-1]).reshape(1, -1, *[1] * len(samples.positions)).expand(shape)
'''


def test_a_source_sees_what_only_exists_during_the_rollout_and_weighs_each_transition(
    prepared: Path, tiny_overrides: list[str], parts: Path
) -> None:
    """Weights 1, 2, 3 of the three transitions: the gradient of a first optimizer step on one of them says which."""
    (parts / "watching.py").write_text(WATCHES)
    more = ["training.transition_choice=shared", "training.trained_transitions=1", "training.micro_batch=2"]
    losses, chosen = {}, set()
    for name in ("watching:Watches", "uniform"):
        setup = set_up(_config(tiny_overrides, *more, f"credit.sources=[{{name: '{name}'}}]"), ROOT, prepared / "demo")
        rollouts = roll_out(setup, 1)
        found = assign_credit(setup, rollouts)
        scores = score_samples(setup, rollouts)
        lesson = choose_lesson(setup, rollouts, found, form_advantages(setup, rollouts, scores, found))
        losses[name] = [
            outcomes_of(setup, lesson, [Place(batch, 0, 0)], {}, {})[0].loss for batch in range(len(lesson.batches))
        ]
        chosen |= set(torch.cat([batch.steps for batch in lesson.batches]).flatten().tolist())
        assert not setup.generator.network._forward_hooks
    (step,) = chosen
    assert step > 0
    for weighted, plain in zip(losses["watching:Watches"], losses["uniform"], strict=True):
        torch.testing.assert_close(weighted, (step + 1.0) * plain)
