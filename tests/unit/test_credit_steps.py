"""Step credit: estimates along the chain, and advantages of transitions."""

import math

import pytest
import torch
from torch import Tensor
from toy_generator import ToyGenerator

from vipo.config.compose import load_config
from vipo.config.sampling import SamplingConfig
from vipo.config.validation import ConfigError
from vipo.credit.steps import clean_estimate, sampled_prediction, step_costs
from vipo.objectives import GroupAdvantages, group_advantages, step_advantages
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.rollout import Trajectory, rollout

GROUPS = torch.tensor([0, 1, 0, 1, 0])
SHIFT = {"shift": torch.tensor([0.1, -0.1, 0.0])}
KEYS = [("steps test", i) for i in range(3)]


def _estimates(generator: ToyGenerator, trajectory: Trajectory, chain: Chain, stochastic: range, how: str) -> Tensor:
    """``(B, S, C, H, W)``."""
    return torch.stack(
        [clean_estimate(generator, SHIFT, trajectory, chain, step, stochastic=stochastic, estimate=how)
         for step in chain.trainable], dim=1,
    )  # fmt: skip


def _advantages(rewards: Tensor, groups: Tensor = GROUPS, clip: float = 5.0) -> GroupAdvantages:
    return step_advantages({"one": rewards}, {"one": 1.0}, groups, 1e-4, clip)


@pytest.mark.parametrize("transition", ["dance", "flow", "cps", "ddim"])
@pytest.mark.parametrize("stochastic", [range(3), range(1, 2)])
def test_what_was_predicted_is_read_off_the_chain(transition: str, stochastic: range) -> None:
    """No network call: to rounding, over a step of the chain."""
    generator = ToyGenerator()
    ddim = transition == "ddim"
    generator.prediction = "noise" if ddim else "velocity"
    alphas = torch.linspace(0.999, 0.01, 1000) if ddim else None
    settings = SamplingConfig(steps=4, shift=1.0 if ddim else 2.0, transition=transition, eta=0.7)
    chain = sampling_chain(settings, generator.prediction, alphas)
    trajectory = rollout(generator, SHIFT, chain, stochastic, KEYS, KEYS)
    for step in range(3):
        with torch.no_grad():
            expected = generator.predict(trajectory.latents[:, step], chain.times[step].expand(3), SHIFT)
        found = sampled_prediction(trajectory, chain, step, stochastic)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_tweedie_is_the_mean_of_x0_at_each_state() -> None:
    generator = ToyGenerator()
    chain = sampling_chain(SamplingConfig(steps=4, shift=2.0, transition="flow", eta=0.7), "velocity")
    trajectory = rollout(generator, SHIFT, chain, range(3), KEYS, KEYS)
    found = _estimates(generator, trajectory, chain, range(3), "tweedie")
    assert found.shape == (3, 3, 2, 4, 4)
    for step, sigma in enumerate((1.0, 6 / 7, 2 / 3)):
        with torch.no_grad():
            velocity = generator.network(trajectory.latents[:, step], torch.full((3,), sigma), SHIFT["shift"])
        torch.testing.assert_close(found[:, step], trajectory.latents[:, step] - sigma * velocity, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_tweedie_of_a_network_that_predicts_noise_or_v(prediction: str) -> None:
    alphas = torch.linspace(0.999, 0.01, 1000)
    generator = ToyGenerator()
    generator.prediction = prediction
    chain = sampling_chain(SamplingConfig(steps=4, transition="ddim", eta=1.0), prediction, alphas)
    trajectory = rollout(generator, SHIFT, chain, range(3), KEYS, KEYS)
    found = _estimates(generator, trajectory, chain, range(3), "tweedie")
    time = chain.times[1].expand(3)
    alpha = float(alphas[int(time[0])])
    with torch.no_grad():
        noise = generator.network(trajectory.latents[:, 1], time, SHIFT["shift"])
    if prediction == "v":
        # v = sqrt(alpha) noise - sqrt(1 - alpha) x0.
        noise = (noise + math.sqrt(1 - alpha) * found[:, 1]) / math.sqrt(alpha)
    # x = sqrt(alpha) x0 + sqrt(1 - alpha) noise, solved for x0.
    back = math.sqrt(alpha) * found[:, 1] + math.sqrt(1 - alpha) * noise
    torch.testing.assert_close(back, trajectory.latents[:, 1], rtol=1e-4, atol=1e-3)


def test_of_an_ode_chain_every_ode_estimate_is_the_sample() -> None:
    generator = ToyGenerator()
    chain = sampling_chain(SamplingConfig(steps=4, shift=2.0, transition="flow", eta=0.7), "velocity")
    trajectory = rollout(generator, SHIFT, chain, range(0), KEYS, KEYS)
    found = _estimates(generator, trajectory, chain, range(0), "ode")
    for step in range(3):
        torch.testing.assert_close(found[:, step], trajectory.clean, rtol=1e-4, atol=1e-4)
    noisy = rollout(generator, SHIFT, chain, range(3), KEYS, KEYS)
    moved = _estimates(generator, noisy, chain, range(3), "ode")
    assert not torch.allclose(moved[:, 0], noisy.clean, atol=1e-2)


def test_ode_estimates_call_the_network_once_for_each_later_step(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, calls = ToyGenerator(), []
    chain = sampling_chain(SamplingConfig(steps=4, shift=2.0, transition="flow", eta=0.7), "velocity")
    trajectory = rollout(generator, SHIFT, chain, range(3), KEYS, KEYS)
    plain = generator.predict
    monkeypatch.setattr(generator, "predict", lambda *given: calls.append(1) or plain(*given))
    for how, count in (("tweedie", 0), ("ode", 6)):
        calls.clear()
        _estimates(generator, trajectory, chain, range(3), how)
        assert len(calls) == count == step_costs(how, 4, 2).network_calls
        assert (step_costs(how, 4, 2).decodes, step_costs(how, 4, 2).reward_calls) == (3, 6)


def test_advantages_of_steps_equal_the_explicit_loop() -> None:
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    found = _advantages(rewards).values
    for step in range(3):
        for sample in range(5):
            members = [i for i in range(5) if GROUPS[i] == GROUPS[sample]]
            gains = [float(rewards[i, step + 1]) - float(rewards[i, step]) for i in members]
            mean = sum(gains) / len(gains)
            spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1))
            own = float(rewards[sample, step + 1]) - float(rewards[sample, step])
            assert float(found[sample, step]) == pytest.approx((own - mean) / (spread + 1e-4), rel=1e-4)


def test_several_rewards_are_normalised_apart_weighted_and_added() -> None:
    draw = torch.Generator().manual_seed(1)
    one, other = (torch.rand(5, 4, generator=draw) for _ in range(2))
    found = step_advantages({"one": one, "other": 100 * other}, {"one": 1.0, "other": -0.5}, GROUPS, 1e-4, 50.0)
    expected = _advantages(one, clip=50).values - 0.5 * _advantages(100 * other, clip=50).values
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
    final = {"one": one[:, -1], "other": 100 * other[:, -1]}
    whole = group_advantages(final, {"one": 1.0, "other": -0.5}, GROUPS, 1e-4, 50.0)
    assert torch.equal(found.group_std, whole.group_std)


def test_the_gains_of_a_chain_sum_to_its_whole_gain() -> None:
    """Siblings begin at the same noise: where steps are not rescaled apart, their advantages sum to the sample's."""
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(2))
    rewards[:, 0] = 0.25
    groups = torch.zeros(3, dtype=torch.int64)
    found = _advantages(rewards, groups, clip=100.0).values
    gains = rewards.double().diff(dim=1)
    unscaled = found.double() * (gains.std(dim=0) + 1e-4)
    torch.testing.assert_close(unscaled.sum(dim=1), rewards[:, -1].double() - rewards[:, -1].double().mean())


def test_of_one_transition_the_advantage_is_the_samples() -> None:
    rewards = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
    rewards[:, 0] = 0.5
    whole = group_advantages({"one": rewards[:, 1]}, {"one": 1.0}, GROUPS, 1e-4, 5.0)
    torch.testing.assert_close(_advantages(rewards).values[:, 0], whole.values, rtol=1e-5, atol=1e-6)


def test_what_no_transition_made_pushes_none() -> None:
    rewards = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.5, 0.75], [0.0, 0.5, 0.25]])
    groups = torch.zeros(3, dtype=torch.int64)
    found = _advantages(rewards, groups).values
    assert found[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert found[:, 1].sign().tolist() == [0.0, 1.0, -1.0]
    rewards[1, 1] = math.nan
    left = _advantages(rewards, groups)
    assert left.valid.tolist() == [True, False, True]
    assert left.values[1].tolist() == [0.0, 0.0]
    assert bool(left.values.isfinite().all())
    assert _advantages(1e6 * rewards, groups, clip=0.5).values.abs().max() == 0.5
    with pytest.raises(ValueError, match="expected"):
        _advantages(rewards[:, :1], groups)


def test_a_group_that_ends_alike_has_no_advantage_at_any_step() -> None:
    rewards = torch.rand(4, 3, generator=torch.Generator().manual_seed(4))
    rewards[[0, 1], -1] = 0.5
    found = _advantages(rewards, torch.tensor([0, 0, 1, 1]))
    assert found.values[:2].count_nonzero() == 0
    assert found.values[2:].count_nonzero() == 4
    assert found.zero_std.tolist() == [True, False]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("credit.multiplies=reward", "leaves none to give; use multiplies=advantage"),
        ("objective={name: nft}", "objective.name 'nft' has none to train; set credit.steps=none"),
    ],
)
def test_what_trains_no_transitions_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(["experiment=demo", "arm=vipo", "credit.steps=ode", override])


@pytest.mark.parametrize("estimate", ["tweedie", "ode"])
def test_arms(estimate: str) -> None:
    config = load_config(["experiment=demo", f"arm=step_{estimate}"])
    assert (config.credit.steps, config.credit.sources, config.objective.ratio) == (estimate, (), "sample")
