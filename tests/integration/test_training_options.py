"""The setup's options on the tiny generator: each one trains, does what it says, and resumes to the same bytes."""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vipo.config.compose import load_config, repository_root
from vipo.config.validation import ConfigError
from vipo.errors import Preempted
from vipo.evaluation.sample import trained_weights
from vipo.objectives import Advantages, Points, best_and_worst
from vipo.provenance import file_sha256, read_provenance
from vipo.sampling.chain import stochastic_steps
from vipo.training import recorded
from vipo.training import run as run_module
from vipo.training.checkpoints import load_checkpoint
from vipo.training.consistency import check_consistency
from vipo.training.errors import TrainingError
from vipo.training.learn import learn, outcomes_of, reference_predictions
from vipo.training.lesson import Lesson, Place
from vipo.training.plan import plan
from vipo.training.recorded import train_run
from vipo.training.samples import MicroBatch, arrange_samples, update_prompts
from vipo.training.setup import Setup, set_up
from vipo.training.state import run_identity
from vipo.training.update import roll_out, update

ROOT = repository_root()
LORA = "training.lora={rank: 2, alpha: 2.0}"
MANY = ["training.group_size=8", "training.best_of=4"]


def _setup(results: Path, overrides: list[str], *more: str) -> Setup:
    return set_up(load_config([*overrides, *more]), ROOT, results / "demo")


def _train(results: Path, overrides: list[str]) -> None:
    setup = _setup(results, overrides)
    run_module.train(setup, run_identity(setup))


COMBINATIONS: dict[str, list[str]] = {
    "flow": ["arm=vipo", "sampling.transition=flow"],
    "cps-unscaled": ["arm=vipo", "sampling.transition=cps", "objective.density=squared_error"],
    "window-random": ["arm=vipo", "sampling.window={size: 2, move: random}"],
    "window-shared": ["arm=vipo", "sampling.window={size: 2, move: random, shared_start: true}"],
    "window-dpm2": ["arm=vipo", "sampling.window={size: 2, move: random, solver: dpm2}"],
    "guard-sum": ["arm=vipo", "objective.ratio_norm=guard", "objective.channels=sum"],
    "guard-grpo-flow": ["arm=grpo", "objective.ratio_norm=guard", "sampling.transition=flow"],
    "flow_grpo": ["arm=flow_grpo"],
    "kl-lora": ["arm=vipo", "objective.kl_weight=0.1", LORA],
    "best_of": ["arm=vipo", *MANY],
    "reward_map-batch-best_of": ["arm=reward_map", "advantages.std=batch", *MANY],
    "paper": ["arm=vipo_paper", "training.transition_choice=shared", "training.epochs=2"],
    "bf16": ["arm=vipo", "generator.precision=bf16", *MANY],
    "bf16-weights": ["arm=vipo", "generator.precision=bf16", "generator.weights=bf16", LORA, *MANY],
    "no-clip-first": ["arm=uniform", "objective.gate={name: none}", "training.transition_choice=first"],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_options_train(prepared: Path, tiny_overrides: list[str], name: str) -> None:
    setup = _setup(prepared, tiny_overrides, *COMBINATIONS[name])
    before = {key: value.detach().clone() for key, value in setup.trainable.items()}
    objective, training = setup.config.objective, setup.config.training
    for number in (1, 2):
        metrics = update(setup, number)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["log_ratio/max_before_first_step"] <= training.log_ratio_tolerance
        assert metrics["log_ratio/rms_before_first_step"] <= metrics["log_ratio/max_before_first_step"]
        # The policy moved in the first optimizer step; a mean over positions moves less than they do.
        assert 0 < metrics["log_ratio/rms_sample"] < metrics["log_ratio/rms_position"]
        assert metrics["grad/norm"] > 0
        assert ("kl" in metrics) == (objective.kl_weight > 0)
        assert ("map/mean" in metrics) == bool(setup.config.credit.sources)
        assert (objective.gate.name == "none") <= (metrics["clip/share"] == 0)
        trained = {int(key.removeprefix("clip/share_t")) for key in metrics if key.startswith("clip/share_t")}
        window = setup.config.sampling.window
        assert trained <= set(stochastic_steps(window, 3, 0, number))
        if window is not None or training.transition_choice != "per_sample":
            assert len(trained) == 2
    assert any(not torch.equal(before[key], value) for key, value in setup.trainable.items())


def test_an_orientation_that_was_not_measured_is_told_once(
    prepared: Path, tiny_overrides: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    _setup(prepared, tiny_overrides, "arm=vipo")
    assert "not measured" not in caplog.text
    _setup(prepared, tiny_overrides, "arm=vipo", "perception.input_size=64")
    assert caplog.text.count("whether 'norm' finds the object with 'efficientnet_lite0'") == 1
    assert "vipo orientation" in caplog.text


def test_controls_share_the_rollout_and_differ_in_the_map(prepared: Path, tiny_overrides: list[str]) -> None:
    first = {}
    for arm in ("vipo", "mean_map", "group_map", "shuffled", "oracle", "inverted", "vipo_mean"):
        first[arm] = update(_setup(prepared, tiny_overrides, f"arm={arm}"), 1)
    assert len({metrics["reward/mean"] for metrics in first.values()}) == 1
    assert all(math.isfinite(value) for metrics in first.values() for value in metrics.values())
    for arm in ("mean_map", "group_map", "shuffled"):
        assert first[arm]["map/mean"] == pytest.approx(first["vipo"]["map/mean"], rel=1e-5)
    assert first["shuffled"]["map/entropy"] == pytest.approx(first["vipo"]["map/entropy"], rel=1e-5)
    assert first["mean_map"]["map/entropy"] == pytest.approx(1)
    assert first["vipo"]["map/entropy"] < first["group_map"]["map/entropy"] < 1
    assert first["vipo_mean"]["map/mean"] == pytest.approx(1, rel=1e-5)
    assert first["oracle"]["map/mean"] != pytest.approx(first["vipo"]["map/mean"], rel=1e-3)


# ---- what has no gradient --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["arm=vipo"],
        ["arm=flow_grpo", "objective.kl_weight=0"],
        ["arm=awm", "objective.kl_weight=0", "objective.anchor_weight=0"],
    ],
    ids=["vipo", "flow_grpo", "awm"],
)
@pytest.mark.parametrize("equal", [1, 2])
def test_a_micro_batch_without_gradient_is_not_called_and_no_bit_moves(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, options: list[str], equal: int
) -> None:
    """Of one group, or both, all rewards are equal; an optimizer step without any gradient is made as it is planned."""
    found = []
    for leaves_out in (True, False):
        setup = _setup(prepared, tiny_overrides, *options, "training.micro_batch=2")
        prompts = sorted({prompt.text for prompt in update_prompts(setup.prompts, setup.config.seed, 1, 2)})[:equal]

        def graded(images: Tensor, texts: list[str], metadata: Any, alike: list[str] = prompts) -> Tensor:
            own = torch.tensor([text in alike for text in texts])
            return torch.where(own, 0.4, images.flatten(1).mean(dim=1))

        setup.rewards["object_redness"] = graded
        if not leaves_out:
            monkeypatch.setattr(type(setup.objective), "only_advantages", False)
        calls: list[int] = []
        inner = setup.generator.predict

        def counted(*arguments: Any, inner: Any = inner, calls: list[int] = calls, **more: Any) -> Tensor:
            calls.append(int(torch.is_grad_enabled()))
            found: Tensor = inner(*arguments, **more)
            return found

        monkeypatch.setattr(setup.generator, "predict", counted)
        metrics = update(setup, 1)
        assert metrics["group/zero_std_share"] == equal / 2
        found.append((sum(calls), metrics, {name: value.detach().clone() for name, value in setup.trainable.items()}))
    (called, first, weights), (all_calls, second, others) = found
    assert called == (all_calls // 2 if equal == 1 else all_calls)
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert [first[name] for name in ("loss", "grad/norm")] == [second[name] for name in ("loss", "grad/norm")]
    # Those by transition are of the transitions that were called.
    of_all = {name for name in second if not name.startswith("clip/share_t")}
    assert of_all == {name for name in first if not name.startswith("clip/share_t")}
    assert (first["grad/norm"] > 0) == (equal == 1)


# ---- KL to the generator as it was ----------------------------------------------------------------


def _one_transition(setup: Setup) -> tuple[MicroBatch, Tensor]:
    batch = roll_out(setup, 1).batches[0]
    return batch, batch.steps[:, 0]


def _kl(setup: Setup, batch: MicroBatch, steps: Tensor) -> Tensor:
    """What the weight of the divergence, which is linear in it, adds to the loss: that of no advantage is 0."""
    samples = arrange_samples(update_prompts(setup.prompts, setup.config.seed, 1, 2), 4, 2)
    advantages = Advantages(torch.zeros(len(samples), *setup.generator.grid), torch.zeros(len(samples)))
    (outcome,) = outcomes_of(setup, Lesson(1, [batch], advantages, samples), [Place(0, 0, 0)], {}, {})
    assert torch.equal(batch.steps[:, 0], steps)
    kl = outcome.loss / setup.config.objective.kl_weight
    torch.testing.assert_close(kl.detach(), outcome.metrics["kl"])
    return kl


@pytest.mark.parametrize("lora", [[], [LORA]], ids=["full", "lora"])
def test_kl_is_to_the_generator_as_it_was(prepared: Path, tiny_overrides: list[str], lora: list[str]) -> None:
    setup = _setup(prepared, tiny_overrides, "arm=vipo", "objective.kl_weight=0.1", *lora)
    untouched = _setup(prepared, tiny_overrides, "arm=vipo").generator
    batch, steps = _one_transition(setup)
    assert float(_kl(setup, batch, steps).detach()) == 0
    update(setup, 1)
    kl = _kl(setup, batch, steps)
    with torch.no_grad():
        latents, times = batch.trajectory.at(steps)[0], setup.chain.times[steps]
        normals = []
        for generator in (setup.generator, untouched):
            prediction = generator.predict(latents, times, batch.conditioning)
            normals.append(torch.distributions.Normal(*setup.chain.gaussian(latents, prediction, steps)))
        expected = torch.distributions.kl_divergence(*normals).mean()
    (reference,) = reference_predictions(setup, [Points(latents, times)], batch)
    assert torch.equal(reference, prediction)
    assert float(kl.detach()) > 0
    torch.testing.assert_close(kl.detach(), expected)
    # The policy is back in place and as trainable as before.
    assert all(value.requires_grad for value in setup.trainable.values())
    assert {n for n, v in setup.generator.network.named_parameters() if v.requires_grad} == set(setup.trainable)
    # Along its own gradient the divergence changes as finite differences say: it flows through the network's mean.
    values = list(setup.trainable.values())
    gradients = torch.autograd.grad(kl, values)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert float(norm) > 0
    sizes, found = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(values, [sign * sizes * gradient / norm for gradient in gradients])
        found.append(float(_kl(setup, batch, steps).detach()))
        with torch.no_grad():
            torch._foreach_sub_(values, [sign * sizes * gradient / norm for gradient in gradients])
    assert (found[0] - found[1]) / (2 * sizes) == pytest.approx(float(norm), rel=0.05)


@pytest.mark.parametrize("lora", [[], [LORA]], ids=["full", "lora"])
def test_kl_enters_the_loss_by_its_weight(prepared: Path, tiny_overrides: list[str], lora: list[str]) -> None:
    """Before the first step the divergence and its gradient are 0: two runs part after the second alone."""
    runs = {}
    for weight in (0.0, 1e6):
        setup = _setup(prepared, tiny_overrides, "arm=vipo", f"objective.kl_weight={weight}", *lora)
        runs[weight] = update(setup, 1)
    assert runs[1e6]["log_ratio/rms_position"] == runs[0.0]["log_ratio/rms_position"]
    assert runs[1e6]["kl"] > 0
    assert runs[1e6]["loss"] - runs[0.0]["loss"] == pytest.approx(1e6 * runs[1e6]["kl"], rel=1e-3)


# ---- the best and the worst ------------------------------------------------------------------------


def test_best_of_learns_from_the_best_and_the_worst(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = _setup(prepared, tiny_overrides, "arm=grpo", *MANY)
    seen: dict[str, Any] = {}

    def spy(setup: Setup, lesson: Lesson) -> dict[str, float]:
        seen.update(batches=lesson.batches, advantages=lesson.advantages.scalar, samples=lesson.samples)
        return learn(setup, lesson)

    monkeypatch.setattr("vipo.training.update.learn", spy)
    update(setup, 1)
    rows = [row for batch in seen["batches"] for row in batch.rows]
    assert len(rows) == len(set(rows)) == 8
    groups = torch.tensor([sample.group for sample in seen["samples"]])
    assert sorted(rows) == sorted(best_and_worst(seen["advantages"], groups, 4).flatten().tolist())
    # Each of the two optimizer steps takes one of the best and one of the worst of each group.
    for half in (rows[:4], rows[4:]):
        assert groups[half].tolist() == [0, 0, 1, 1]
        assert all(float(seen["advantages"][a]) >= float(seen["advantages"][b]) for a, b in (half[:2], half[2:]))


def test_other_batches_in_rollout_decoding_and_rewards(prepared: Path, tiny_overrides: list[str]) -> None:
    """The same samples but for rounding; the check before the first step measures what the ratio makes of it."""
    own = ["training.rollout_batch=8", "training.decode_batch=3", "training.reward_batch=5"]
    chosen = ["arm=vipo", "training.micro_batch=2", "training.log_ratio_tolerance=1e-3", "credit.steps=tweedie"]
    sizes: dict[str, list[int]] = {"predict": [], "pictures": [], "reward": []}
    setups = [_setup(prepared, [*tiny_overrides, *chosen], *more) for more in ([], own)]
    first = update(setups[0], 1)
    generator, (label,) = setups[1].generator, setups[1].rewards
    for name in ("predict", "pictures"):
        call = getattr(generator, name)

        def noted(latents: Tensor, *rest: Any, name: str = name, call: Callable[..., Any] = call) -> Any:
            sizes[name].append(len(latents))
            return call(latents, *rest)

        setattr(generator, name, noted)
    reward = setups[1].rewards[label]

    def scored(pictures: Tensor, *rest: Any) -> Any:
        sizes["reward"].append(len(pictures))
        return reward(pictures, *rest)

    setups[1].rewards[label] = scored
    second = update(setups[1], 1)
    steps = setups[1].config.sampling.steps
    assert sizes["predict"] == [8] * steps + [2] * 8
    # The samples, and the estimates before each transition.
    assert sizes["pictures"] == [3, 3, 2] * steps
    assert sizes["reward"] == [5, 3] * steps
    assert second["reward/mean"] == pytest.approx(first["reward/mean"], rel=1e-4)
    assert first["log_ratio/max_before_first_step"] == 0 <= second["log_ratio/max_before_first_step"] <= 1e-3
    with pytest.raises(ConfigError, match="rollout_batch 3 is not a multiple of micro_batch 2"):
        load_config([*tiny_overrides, *chosen, "training.rollout_batch=3"])


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_the_steps_before_a_window_are_drawn_once_for_a_group(
    prepared: Path, tiny_overrides: list[str], solver: str
) -> None:
    """The chains of before but for rounding; what is trained begins at states that are stored, so the ratio is 1."""
    chosen = ["arm=vipo", "sampling.steps=6", "training.micro_batch=2", "training.group_size=4"]
    trajectories, calls, ratios = [], [], []
    for shared in ("false", "true"):
        window = f"sampling.window={{size: 2, move: fixed, start: 3, solver: {solver}, shared_start: {shared}}}"
        setup = _setup(prepared, tiny_overrides, *chosen, window)
        sizes: list[int] = []
        inner = setup.generator.predict

        def counted(latents: Tensor, *rest: Any, inner: Any = inner, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(latents))
            found: Tensor = inner(latents, *rest)
            return found

        setattr(setup.generator, "predict", counted)  # noqa: B010 (of an instance)
        rollouts = roll_out(setup, 1)
        trajectories.append(torch.cat([batch.trajectory.latents for batch in rollouts.batches]))
        calls.append(sum(sizes))
        planned = plan(setup.config, ROOT, 8)
        assert planned.evaluations["rollouts"] == calls[-1]
        assert (planned.held["shared starts"] > 0) == (shared == "true")
        ratios.append(update(setup, 1)["log_ratio/max_before_first_step"])
    # Of 8 samples in two groups, 3 steps of 6.
    assert calls == [8 * 6, 8 * 3 + 2 * 3]
    torch.testing.assert_close(trajectories[0], trajectories[1], atol=1e-4, rtol=1e-4)
    for group in range(2):
        own = trajectories[1][rollouts.groups == group, :4]
        assert all(torch.equal(chain, own[0]) for chain in own)
    assert ratios == [0, 0]


# ---- resume ----------------------------------------------------------------------------------------

RESUMED = {
    "slide": ["arm=vipo", "sampling.window={size: 2, every: 1}"],
    "kl": ["arm=vipo", "objective.kl_weight=0.1"],
    "kl-lora-best_of": ["arm=vipo", "objective.kl_weight=0.1", LORA, *MANY],
    "sgd-lora": ["arm=vipo", "optimizer=sgd", "optimizer.momentum=0.9", "optimizer.learning_rate=0.1", LORA],
    "normalised": ["arm=vipo", "optimizer=normalised", "optimizer.learning_rate=0.01"],
    "adamw_8bit": ["arm=vipo", "optimizer=adamw_8bit"],
    "ema-cosine-lora": ["arm=vipo", "training.ema_decay=0.5", "optimizer.schedule=cosine", LORA],
}


def test_the_mean_of_the_weights_is_that_of_a_loop(prepared: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    results = shutil.copytree(prepared, tmp_path / "results")
    chosen = ["arm=vipo", "training.updates=3", "training.save_at=[1, 2]", "training.ema_decay=0.28"]
    setup = _setup(results, [*tiny_overrides, *chosen, "optimizer.schedule=cosine", "optimizer.warmup_updates=1"])
    mean = {name: value.detach().double() for name, value in setup.trainable.items()}
    run_module.train(setup, run_identity(setup))
    run = setup.folder
    kept = [run / "updates/000001", run / "updates/000002", run / "weights"]
    for number, folder in enumerate(kept, 1):
        trained, found = (load_file(*(part / "transformer").glob("*.safetensors")) for part in (folder, folder / "ema"))
        decay = min(0.28, (1 + number) / (10 + number))
        mean = {name: decay * value + (1 - decay) * trained[name].double() for name, value in mean.items()}
        assert found.keys() == mean.keys() == trained.keys()
        for name, value in found.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), mean[name], atol=1e-7, rtol=1e-6)
        assert any(not torch.equal(found[name], trained[name]) for name in found)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rate = setup.config.optimizer.learning_rate
    assert [row["optimizer/learning_rate"] for row in rows] == pytest.approx([rate, rate, rate / 2])
    # What an evaluation of it reads.
    config = load_config([*tiny_overrides, *chosen, "evaluation.weights=ema", "optimizer.schedule=cosine"])
    config = config.model_copy(update={"optimizer": setup.config.optimizer})
    assert trained_weights(config, run, ROOT) == {n: folder / "ema" for n, folder in enumerate(kept, 1)}


@pytest.mark.parametrize(
    "name",
    [
        # bitsandbytes is in no lock: pip install 'vipo[adamw_8bit]'.
        pytest.param(name, marks=pytest.mark.skipif("8bit" in name and not find_spec("bitsandbytes"), reason="absent"))
        for name in RESUMED
    ],
)
def test_a_resume_ends_with_the_same_bytes(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_overrides, *RESUMED[name], "training.save_at=[]", "training.updates=3"]
    whole, cut = shutil.copytree(prepared, tmp_path / "whole"), shutil.copytree(prepared, tmp_path / "cut")
    _train(whole, overrides)

    def asked(setup: Setup, number: int, *others: Any) -> dict[str, float]:
        metrics = update(setup, number, *others)
        os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "update", asked)
        with pytest.raises(Preempted):
            _train(cut, overrides)
    assert (cut / "demo/runs/vipo-s0/metrics.jsonl").read_text().count("\n") == 1
    _train(cut, overrides)
    kept = [
        {
            str(path.relative_to(results)): path.read_bytes()
            for path in results.glob("demo/runs/vipo-s0/**/*")
            if path.name == "metrics.jsonl" or path.suffix == ".safetensors"
        }
        for results in (whole, cut)
    ]
    assert len(kept[0]) >= 3
    assert kept[0] == kept[1]


def test_every_code_that_made_updates_is_recorded(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Path(shutil.copytree(prepared, tmp_path / "results"))
    config = load_config([*tiny_overrides, "arm=grpo", "training.save_at=[]", "training.updates=4"])
    folder = results / "demo" / "runs" / "grpo-s0"
    first, second = ({"package_sha256": digit * 64, "commit": digit * 40, "dirty": False} for digit in "12")
    stop_after = 0

    def asked(setup: Setup, number: int, *others: Any) -> dict[str, float]:
        metrics = update(setup, number, *others)
        if number == stop_after < 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    def train(code: dict[str, Any], until: int) -> dict[str, Any]:
        nonlocal stop_after
        stop_after = until
        for room in (run_module, recorded):
            monkeypatch.setattr(room, "code_identity", lambda: code)
        with pytest.raises(Preempted) if until < 4 else contextlib.nullcontext():
            train_run(config, ROOT, results / "demo")
        if until < 4:
            return load_checkpoint(folder / "checkpoints" / f"{until:06d}").state
        return read_provenance(folder / "provenance.json")

    monkeypatch.setattr(run_module, "update", asked)
    assert train(first, 1)["code"] == [first]
    assert train(first, 2)["code"] == [first]
    assert train(second, 3)["code"] == [first, second]
    assert train(first, 4)["updates_made_by"] == [first, second]
    # Nothing was left to do, and what is done stays another code's.
    third = first | {"package_sha256": "3" * 64}
    assert train(third, 4)["updates_made_by"] == [first, second]

    shutil.rmtree(folder)
    assert "updates_made_by" not in train(first, 4)
    newest = folder / "checkpoints" / "000004"
    state = json.loads((newest / "state.json").read_text())
    # As an earlier vipo wrote it.
    del state["code"]
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = file_sha256(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert train(first, 4)["updates_made_by"] == [{"package_sha256": None, "commit": None, "dirty": None}]


# ---- policy consistency ----------------------------------------------------------------------------


def _dropout(setup: Setup) -> None:
    network: Any = setup.generator.network
    network.proj_out = nn.Sequential(network.proj_out, nn.Dropout(0.1).train())


def _other_weights(setup: Setup) -> None:
    with torch.no_grad():
        setup.trainable["proj_out.bias"][0] += 1e-2


def _other_precision(setup: Setup) -> None:
    setup.generator.config = setup.generator.config.model_copy(update={"precision": "bf16"})


@pytest.mark.parametrize("broken", [_dropout, _other_weights, _other_precision])
@pytest.mark.parametrize("arm", ["vipo", "grpo"])
def test_another_network_in_the_update_is_an_error(
    prepared: Path,
    tiny_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[Setup], None],
    arm: str,
) -> None:
    setup = _setup(prepared, tiny_overrides, f"arm={arm}")
    weights = {name: value.detach().clone() for name, value in setup.trainable.items()}

    def then_break(*arguments: Any) -> Any:
        result = roll_out(*arguments)
        broken(setup)
        return result

    monkeypatch.setattr("vipo.training.update.roll_out", then_break)
    told = (
        r"update 1: max \|log rho\| before the first optimizer step is \S+, above training.log_ratio_tolerance 1e-05, "
        r"at \(\d+, \d+\) of transition [012], sample \d of '.*'. .* a dropout or norm layer in training mode, another "
        r"dtype or autocast.*over the transition's std, .* objective.channels .*\(here 'mean'\): docs/method.md"
    )
    with torch.random.fork_rng(devices=[]), pytest.raises(TrainingError, match=told):
        update(setup, 1)
    # It stopped before anything was learned.
    assert broken is _other_weights or all(torch.equal(weights[n], v) for n, v in setup.trainable.items())


def test_the_error_names_the_position(prepared: Path, tiny_overrides: list[str]) -> None:
    setup = _setup(prepared, tiny_overrides, "arm=vipo")
    batch, _ = _one_transition(setup)
    prompts = update_prompts(setup.prompts, setup.config.seed, 1, 2)
    samples = arrange_samples(prompts, 4, 2)
    for shape, place in (((4, 5, 6), (3, 2)), ((4, 2, 5, 6), (1, 3, 2))):
        log_ratio = torch.zeros(shape)
        log_ratio[2][place] = -0.25
        log_ratio[0][place] = 0.125
        steps = torch.tensor([0, 1, 2, 0])
        with pytest.raises(TrainingError) as caught:
            check_consistency(setup.config, log_ratio, batch, steps, samples, 7)
        sample = samples[batch.rows[2]]
        told = f"is 0.25, above training.log_ratio_tolerance 1e-05, at {place} of transition 2, sample {sample.index}"
        assert told in str(caught.value)
        assert repr(sample.prompt.text) in str(caught.value)
        log_ratio[2][place] = torch.nan
        with pytest.raises(TrainingError, match=r"update 7: log rho is not finite at .* of transition 2, sample"):
            check_consistency(setup.config, log_ratio, batch, steps, samples, 7)
    compiled = setup.config.model_copy(
        update={"generator": setup.config.generator.model_copy(update={"compile": "blocks"})}
    )
    told = r"compiled with gradients than without: set generator\.compile=none\. Round"
    with pytest.raises(TrainingError, match=told):
        check_consistency(compiled, torch.ones(4, 5, 6), batch, torch.tensor([0, 1, 2, 0]), samples, 7)
    assert check_consistency(setup.config, torch.full((4, 5, 6), 1e-6), batch, steps, samples, 7) == pytest.approx(1e-6)


def test_what_a_run_was_loaded_with_stays(prepared: Path, tiny_overrides: list[str]) -> None:
    """The reference is a copy of its own: steps on the policy leave its bytes alone."""
    setup = _setup(prepared, tiny_overrides, "arm=flow_grpo")
    assert setup.reference is not None
    before = copy.deepcopy(setup.reference.state_dict())
    update(setup, 1)
    assert all(torch.equal(before[name], value) for name, value in setup.reference.state_dict().items())
    assert not any(value.requires_grad for value in setup.reference.parameters())
