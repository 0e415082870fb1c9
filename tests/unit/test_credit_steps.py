"""Step credit: estimates along the chain, and advantages of transitions."""

import math

import pytest
import torch
from toy_generator import ToyGenerator

from vipo.config.sampling import SamplingConfig
from vipo.credit.steps import clean_estimates, step_advantages
from vipo.sampling.chain import sampling_chain
from vipo.sampling.rollout import rollout

GROUPS = torch.tensor([0, 1, 0, 1, 0])
SHIFT = {"shift": torch.tensor([0.1, -0.1, 0.0])}
KEYS = [("steps test", i) for i in range(3)]


def test_tweedie_is_the_mean_of_x0_at_each_state() -> None:
    generator = ToyGenerator()
    chain = sampling_chain(SamplingConfig(steps=4, shift=2.0, transition="flow", eta=0.7), "velocity")
    trajectory = rollout(generator, SHIFT, chain, range(3), KEYS, KEYS)
    found = clean_estimates(generator, SHIFT, trajectory, chain)
    assert found.shape == (3, 4, 2, 4, 4)
    for step, sigma in enumerate((1.0, 6 / 7, 2 / 3)):
        with torch.no_grad():
            velocity = generator.network(trajectory.latents[:, step], torch.full((3,), sigma), SHIFT["shift"])
        torch.testing.assert_close(found[:, step], trajectory.latents[:, step] - sigma * velocity)
    assert torch.equal(found[:, 3], trajectory.clean)


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_tweedie_of_a_network_that_predicts_noise_or_v(prediction: str) -> None:
    alphas = torch.linspace(0.999, 0.01, 1000)
    generator = ToyGenerator()
    generator.prediction = prediction
    chain = sampling_chain(SamplingConfig(steps=4, transition="ddim", eta=1.0), prediction, alphas)
    trajectory = rollout(generator, SHIFT, chain, range(3), KEYS, KEYS)
    found = clean_estimates(generator, SHIFT, trajectory, chain)
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
    found = clean_estimates(generator, SHIFT, trajectory, chain, ode_steps=True)
    for step in range(4):
        torch.testing.assert_close(found[:, step], trajectory.clean)
    noisy = rollout(generator, SHIFT, chain, range(3), KEYS, KEYS)
    moved = clean_estimates(generator, SHIFT, noisy, chain, ode_steps=True)
    assert not torch.allclose(moved[:, 0], moved[:, 3], atol=1e-2)


def test_advantages_of_steps_equal_the_explicit_loop() -> None:
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    found = step_advantages(rewards, GROUPS, 1e-4, 5.0)
    for step in range(3):
        for sample in range(5):
            members = [i for i in range(5) if GROUPS[i] == GROUPS[sample]]
            gains = [float(rewards[i, step + 1]) - float(rewards[i, step]) for i in members]
            mean = sum(gains) / len(gains)
            spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1))
            own = float(rewards[sample, step + 1]) - float(rewards[sample, step])
            assert float(found[sample, step]) == pytest.approx((own - mean) / (spread + 1e-4), rel=1e-4)


def test_what_no_transition_made_pushes_none() -> None:
    rewards = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.5, 0.75], [0.0, 0.5, 0.25]])
    groups = torch.zeros(3, dtype=torch.int64)
    found = step_advantages(rewards, groups, 1e-4, 5.0)
    assert found[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert found[:, 1].sign().tolist() == [0.0, 1.0, -1.0]
    rewards[1, 1] = math.nan
    left = step_advantages(rewards, groups, 1e-4, 5.0)
    assert left[1].tolist() == [0.0, 0.0]
    assert bool(left.isfinite().all())
    assert step_advantages(1e6 * rewards, groups, 1e-4, 0.5).abs().max() == 0.5
    with pytest.raises(ValueError, match="expected"):
        step_advantages(rewards[:, :1], groups, 1e-4, 5.0)
