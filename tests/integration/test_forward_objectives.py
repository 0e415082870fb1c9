"""DiffusionNFT, AWM and Flow-DPPO's gate on the tiny generator: each trains as told, and resumes to the same bytes."""

import math
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import OTHER_FAMILY
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.config.forward import AwmConfig, NftConfig
from vipo.config.objective import DivergenceGateConfig
from vipo.config.validation import ConfigError
from vipo.errors import Preempted
from vipo.objectives import ObjectiveError
from vipo.objectives.awm import Awm
from vipo.objectives.forward import noised, velocity_kl
from vipo.sampling.noise import keyed_generator
from vipo.stages import encode_stage, prepare_stage
from vipo.training import run as run_module
from vipo.training import update as update_module
from vipo.training.errors import TrainingError
from vipo.training.lesson import Lesson
from vipo.training.run import train
from vipo.training.setup import Setup, set_up
from vipo.training.state import run_identity
from vipo.training.update import update

ROOT = repository_root()
LORA = "training.lora={rank: 2, alpha: 2.0}"
# Both rewards differ within a group, and credit has a layout.
BOTH = "reward.terms=[{name: object_redness, weight: 1.0}, {name: redness, weight: 0.5}]"
BACKBONE = "credit.sources=[{name: backbone}]"
BEST = ["training.group_size=8", "training.best_of=4"]
SLOW = "objective.old={rate: 0.25, hold: 0.5}"


def _setup(results: Path, overrides: list[str], *more: str) -> Setup:
    return set_up(load_config([*overrides, *more]), ROOT, results / "demo")


COMBINATIONS: dict[str, list[str]] = {
    "nft": ["arm=nft"],
    "nft-paper-lora-bf16": ["arm=nft", "objective.form=paper", "objective.z=1.0", LORA, "generator.precision=bf16"],
    "nft-credit-rewards": ["arm=nft", "objective.beta=0.1", SLOW, BACKBONE, BOTH],
    "nft-dpm2": ["arm=nft", "sampling.ode=dpm2", "sampling.same_initial_noise=false", *BEST],
    "nft-map-in-reward": ["arm=nft", BACKBONE, "credit.multiplies=reward", "training.epochs=2"],
    "awm": ["arm=awm"],
    "awm-paper-lora-bf16": ["arm=awm", "objective.form=paper", LORA, "generator.precision=bf16"],
    "awm-credit-rewards": ["arm=awm", BACKBONE, BOTH, "objective.anchor_weight=0.0", "objective.clip_range=1.0e-9"],
    "awm-euler": ["arm=awm", "sampling.ode=euler", "sampling.same_initial_noise=false", "training.epochs=2"],
    "divergence": ["arm=divergence", "objective.gate.bound=1.0e-12"],
    "divergence-position": [
        "arm=vipo",
        "objective.gate={name: divergence, scope: position, bound: 1.0e-12}",
        "generator.precision=bf16",
        LORA,
    ],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_options_train(prepared: Path, tiny_overrides: list[str], name: str) -> None:
    setup = _setup(prepared, tiny_overrides, *COMBINATIONS[name])
    objective = setup.config.objective
    before = {key: value.detach().clone() for key, value in setup.trainable.items()}
    assert set(setup.kept) == set(setup.objective.keeps)
    for policy in setup.kept.values():
        assert policy.tensors.keys() == setup.trainable.keys()
    for number in (1, 2):
        metrics = update(setup, number)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["grad/norm"] > 0
        assert ("distance/reference" in metrics) == setup.objective.needs_reference
        assert ("map/mean" in metrics) == bool(setup.config.credit.sources)
        # NFT compares no likelihoods.
        assert ("log_ratio/rms_sample" in metrics) == ("clip/share" in metrics) == (objective.name != "nft")
        assert ("distance/anchor" in metrics) == ("anchor" in setup.kept)
        assert ("distance/old" in metrics) == (objective.name == "nft")
        if objective.name != "nft":
            assert metrics["log_ratio/max_before_first_step"] == 0
            assert metrics["log_ratio/rms_sample"] > 0
        if name in ("divergence", "divergence-position", "awm-credit-rewards"):
            # Bounds of nearly nothing: what moves on is dropped, what comes back stays.
            assert 0 < metrics["clip/share"] < 1
    assert any(not torch.equal(before[key], value) for key, value in setup.trainable.items())


PAGE = (ROOT / "docs/forward_process.md").read_text(encoding="utf-8")


def test_the_page_s_commands_train(prepared: Path, tiny_overrides: list[str]) -> None:
    commands = re.findall(r"^vipo train experiment=demo (.+)$", PAGE, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        metrics = update(_setup(prepared, tiny_overrides, *shlex.split(command)), 1)
        assert metrics["grad/norm"] > 0


def test_the_page_s_defaults_are_the_configuration_s() -> None:
    rows = re.findall(r"^\| `objective\.(?:gate\.)?(\w+)` \| `?([\w.-]+)`? \|", PAGE, re.MULTILINE)
    sections = (NftConfig(name="nft"), AwmConfig(name="awm"), DivergenceGateConfig(name="divergence"))
    known = {(name, str(value)) for section in sections for name, value in section.model_dump().items()}
    told = {(name, value if name in ("form", "scope") else str(float(value))) for name, value in rows}
    assert len(told) == 10
    assert told <= known


# ---- the losses of an update are those of the formulas ----------------------------------------------


def _by_hand(setup: Setup, lesson: Lesson) -> Tensor:
    """The first optimizer step's loss from the clean samples, drawn noise and the network alone."""
    config, losses = setup.config, []
    for batch in lesson.batches[: len(lesson.batches) // config.training.optimizer_steps_per_update]:
        for slot in range(config.training.trained_transitions):
            for place, row in enumerate(batch.rows):
                sample, level = lesson.samples[row], int(batch.steps[place, slot])
                key = (config.seed, "objective", "forward", lesson.number, sample.prompt.id, sample.index, slot, 0)
                clean = batch.trajectory.clean[place : place + 1]
                eps = torch.randn(clean.shape[1:], generator=keyed_generator(*key)).unsqueeze(0)
                t = setup.chain.levels[level : level + 1]
                latents, velocity = noised(clean, eps, t)
                conditioning = {name: value[place : place + 1] for name, value in batch.conditioning.items()}
                found = setup.generator.predict(latents, t, conditioning)
                error = (found - velocity) ** 2
                advantage, weights = lesson.advantages.values[row], torch.ones(())
                if isinstance(setup.objective, Awm):
                    advantage = lesson.advantages.scalar[row]
                    if lesson.advantages.weights is not None:
                        weights = lesson.advantages.weights[row]
                    # On policy the ratio is 1: value -A, gradient that of A w l.
                    losses.append(0.2 * advantage * _ghuber((weights * error.mean(dim=1)).mean(), float(t)))
                else:
                    # Old policy and policy are one: both halves are the same, and their gradients those of (2q - 1).
                    x0 = latents - t * found - clean
                    size = x0.detach().abs().mean().clamp_min(1e-5)
                    signed = (advantage / 5).clamp(-1, 1)
                    losses.append(5 * (signed * (x0**2).mean(dim=1)[0] / size).mean())
    return torch.stack(losses).mean()


def _ghuber(loss: Tensor, t: float) -> Tensor:
    return t / 0.25 * ((loss + 1e-10) ** 0.25 - 1e-10**0.25)


@pytest.mark.parametrize("credit", [[], [BACKBONE]], ids=["scalar", "credit"])
@pytest.mark.parametrize("arm", ["nft", "awm"])
def test_the_first_gradient_is_that_of_the_formula(
    prepared: Path, tiny_overrides: list[str], arm: str, credit: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = _setup(prepared, tiny_overrides, f"arm={arm}", *credit, "training.optimizer_steps_per_update=1")
    lessons: list[Lesson] = []
    learn = update_module.learn

    def seen(setup: Setup, lesson: Lesson) -> dict[str, float]:
        lessons.append(lesson)
        names, values = zip(*setup.trainable.items(), strict=True)
        expected.update(zip(names, torch.autograd.grad(_by_hand(setup, lesson), values), strict=True))
        return learn(setup, lesson)

    expected: dict[str, Tensor] = {}
    monkeypatch.setattr(update_module, "learn", seen)
    gradients: dict[str, Tensor] = {}

    def taken() -> None:
        gradients.update(
            {name: value.grad.clone() for name, value in setup.trainable.items() if value.grad is not None}
        )

    monkeypatch.setattr(setup.optimizer, "step", taken)
    # Not clipped.
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda values: torch.zeros(()))
    update(setup, 1)
    assert (lessons[0].advantages.weights is not None) == bool(credit)
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        assert float((gradients[name] - value).abs().max()) <= 1e-4 * largest, name


@pytest.mark.parametrize("arm", ["nft", "awm"])
def test_uniform_credit_is_none(prepared: Path, tiny_overrides: list[str], arm: str) -> None:
    found = []
    for source in ("[]", "[{name: uniform}]"):
        setup = _setup(prepared, tiny_overrides, f"arm={arm}", f"credit.sources={source}")
        found.append([update(setup, number)["loss"] for number in (1, 2)])
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("arm", ["nft", "awm"])
def test_equal_rewards_teach_nothing_but_the_pulls(prepared: Path, tiny_overrides: list[str], arm: str) -> None:
    """Neither the reward nor a pull has a gradient while all policies are one; afterwards the pulls alone have."""
    slow = "objective.old={rate: 1.0, hold: 1.0}" if arm == "nft" else "objective.anchor={rate: 1.0, hold: 1.0}"
    setup = _setup(prepared, tiny_overrides, f"arm={arm}", BACKBONE, slow, "training.optimizer_steps_per_update=1")
    setup.rewards["object_redness"] = lambda images, prompts, metadata: torch.full((len(images),), 0.4)
    assert update(setup, 1)["grad/norm"] == 0
    with torch.no_grad():
        for value in setup.trainable.values():
            value.mul_(1.01)
    metrics = update(setup, 2)
    assert metrics["group/zero_std_share"] == 1
    assert metrics["grad/norm"] > 0
    assert metrics["distance/old" if arm == "nft" else "distance/anchor"] > 0


# ---- the policies that are kept ---------------------------------------------------------------------


def _rolled_out(setup: Setup, number: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    found: list[Tensor] = []
    learn = update_module.learn

    def seen(setup: Setup, lesson: Lesson) -> dict[str, float]:
        found.append(torch.cat([batch.trajectory.clean for batch in lesson.batches]))
        return learn(setup, lesson)

    with monkeypatch.context() as patched:
        patched.setattr(update_module, "learn", seen)
        update(setup, number)
    return found[0]


@pytest.mark.parametrize("lora", [[], [LORA]], ids=["full", "lora"])
def test_the_old_policy_samples(
    prepared: Path, tiny_overrides: list[str], lora: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never follows samples as the generator as it was, one that follows at once as the trained policy."""
    base = _rolled_out(_setup(prepared, tiny_overrides, "arm=nft", *lora), 2, monkeypatch)
    for hold, same in ((1.0, True), (0.0, False)):
        setup = _setup(prepared, tiny_overrides, "arm=nft", *lora, f"objective.old={{rate: 1.0, hold: {hold}}}")
        update(setup, 1)
        trained = {name: value.detach().clone() for name, value in setup.trainable.items()}
        followed = all(torch.equal(setup.kept["sampler"].tensors[name], value) for name, value in trained.items())
        assert followed == (not same)
        sampled = _rolled_out(setup, 2, monkeypatch)
        assert torch.equal(sampled, base) == same


def test_kept_policies_follow_by_their_decay(prepared: Path, tiny_overrides: list[str]) -> None:
    """After n optimizer steps, ``d = min(rate max(0, n - flat), hold)``: here two steps an update."""
    setup = _setup(prepared, tiny_overrides, "arm=awm", "objective.anchor={flat: 1, rate: 0.25, hold: 0.6}")
    expected = {name: value.detach().double() for name, value in setup.trainable.items()}
    for number, decay in ((1, 0.25), (2, 0.6)):
        update(setup, number)
        expected = {
            name: decay * expected[name] + (1 - decay) * value.detach().double()
            for name, value in setup.trainable.items()
        }
        for name, value in expected.items():
            torch.testing.assert_close(setup.kept["anchor"].tensors[name].double(), value, rtol=1e-5, atol=1e-7)


def test_predictions_are_of_the_policies_they_say(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an update's first step: old is new (AWM), the anchor is the average, the reference the generator as it was."""
    setup = _setup(prepared, tiny_overrides, "arm=awm", "objective.anchor={rate: 1.0, hold: 1.0}", LORA)
    update(setup, 1)
    first: list[Any] = []
    call = Awm.__call__

    def seen(self: Awm, share: Any, points: Any, predictions: Any, advantages: Any) -> Any:
        first.append(predictions)
        return call(self, share, points, predictions, advantages)

    monkeypatch.setattr(Awm, "__call__", seen)
    update(setup, 2)
    found = first[0]
    assert torch.equal(found.new, found.old)
    # An anchor that stays is, like the network without its adapter, the generator as it was.
    torch.testing.assert_close(found.anchor, found.reference, atol=1e-6, rtol=1e-5)
    assert float(velocity_kl(found.new, found.anchor).detach().max()) > 1e-12


RESUMED = {
    "nft": ["arm=nft", SLOW, BACKBONE],
    "nft-lora": ["arm=nft", SLOW, LORA, "sampling.ode=dpm2", "sampling.same_initial_noise=false"],
    "awm": ["arm=awm", "objective.anchor={rate: 0.25, hold: 0.5}", BACKBONE],
    "divergence": ["arm=divergence"],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_ends_with_the_same_bytes(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_overrides, *RESUMED[name], "training.save_at=[]", "training.updates=3"]
    whole, cut = shutil.copytree(prepared, tmp_path / "whole"), shutil.copytree(prepared, tmp_path / "cut")

    def run(results: Path) -> None:
        setup = _setup(results, overrides)
        train(setup, run_identity(setup))

    def asked(*given: Any) -> dict[str, float]:
        metrics = update(*given)
        os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    run(whole)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "update", asked)
        with pytest.raises(Preempted):
            run(cut)
    run(cut)
    kept = [
        {
            str(path.relative_to(results)): path.read_bytes()
            for path in results.glob("demo/runs/*/**/*")
            if path.name == "metrics.jsonl" or path.suffix == ".safetensors"
        }
        for results in (whole, cut)
    ]
    assert len(kept[0]) >= 3
    assert kept[0] == kept[1]
    # What was kept is no copy of the policy, so that a resume that forgot it would show.
    newest = load_file(next((whole / "demo/runs").glob("*/checkpoints/000003/tensors.safetensors")))
    names = {key.split("/", 2)[2] for key in newest if key.startswith("kept/")}
    assert bool(names) == (name != "divergence")
    if names:
        (part,) = {key.split("/", 2)[1] for key in newest if key.startswith("kept/")}
        assert any(not torch.equal(newest[f"kept/{part}/{key}"], newest[f"network/{key}"]) for key in names)


def test_video(tiny_wan: Path, tmp_path: Path) -> None:
    """Latents (B, C, T, H, W), credit per latent frame: both objectives, and the gate per position."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a fox runs {n}" for n in range(6)) + "\n")
    video = [
        *OTHER_FAMILY,
        "generator=wan",
        f"generator.path={tiny_wan}",
        "generator.frames=9",
        "generator.max_sequence_length=8",
        f"prompts.source={tmp_path / 'prompts.txt'}",
        "training.group_size=4",
        "training.micro_batch=4",
        BACKBONE,
    ]
    config = load_config(video)
    prepare_stage(config, ROOT, tmp_path)
    encode_stage(config, ROOT, tmp_path)
    gate = ["arm=vipo", "objective.gate={name: divergence, scope: position}"]
    for chosen in (["arm=nft"], ["arm=awm"], gate):
        setup = set_up(load_config([*video[:-1], *chosen, BACKBONE]), ROOT, tmp_path / config.experiment.name)
        metrics = update(setup, 1)
        assert len(setup.generator.latent_shape) == 4
        assert metrics["map/entropy"] < 1
        assert metrics["grad/norm"] > 0
        assert all(math.isfinite(value) for value in metrics.values())


# ---- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arm=nft", "sampling.transition=ddim"], "'nft' needs a generator that predicts flow matching's"),
        (["arm=awm", BACKBONE, "credit.multiplies=reward"], "use credit.multiplies=advantage"),
        (["arm=grpo", "sampling.ode=euler", "sampling.same_initial_noise=false"], "without a density"),
        (["arm=nft", "sampling.ode=dpm2"], "all samples of a group would be one"),
        (["arm=nft", "objective.gate.range=1"], "objective.gate: unknown key"),
        (["arm=grpo", "objective.gate={name: divergence, scope: position}"], "'position' needs ratio 'position'"),
        (["arm=nft", "objective.old.hold=1.5"], "objective.old.hold"),
    ],
)
def test_refused(tiny_overrides: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([*tiny_overrides, *overrides])


_OBJECTIVE = """
from vipo.objectives import Objective


class {name}(Objective):
    {says}

    def points(self, share):
        raise NotImplementedError

    def __call__(self, share, points, predictions, advantages):
        raise NotImplementedError
"""


def test_an_objective_of_others_that_needs_noise_refuses_the_ode(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy_objective.py").write_text(_OBJECTIVE.format(name="Noisy", says="needs = 'stochastic'"))
    monkeypatch.syspath_prepend(tmp_path)
    chosen = ["arm=grpo", "objective={name: 'noisy_objective:Noisy'}", "sampling.same_initial_noise=false"]
    with pytest.raises(TrainingError, match=r"needs noise in the chain's steps; set sampling\.ode=null"):
        _setup(prepared, tiny_overrides, *chosen, "sampling.ode=euler")


def test_an_objective_of_others_keeps_policies_that_there_are(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "keeps = {'average': None}"
    (tmp_path / "greedy_objective.py").write_text(_OBJECTIVE.format(name="Greedy", says=says))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ObjectiveError, match=r"'greedy_objective:Greedy': keeps: expected a DecayConfig by .*'average'"
    ):
        _setup(prepared, tiny_overrides, "arm=grpo", "objective={name: 'greedy_objective:Greedy'}")
