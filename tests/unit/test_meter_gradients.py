"""The meter's two gradients: against finite differences, one whole graph, explicit loops, and each other."""

import pytest
import torch
from torch import Tensor
from toy_generator import ToyGenerator, left_redness

from vipo.config.sampling import SamplingConfig
from vipo.credit.meter.gradients import (
    Chains,
    MeterError,
    flat,
    pathwise_gradients,
    total_gradient,
    update_gradients,
)
from vipo.credit.meter.space import CountSketch, Whole, choose_space, products
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.rollout import rollout
from vipo.sampling.transitions import position_log_prob

REWARDS, WEIGHTS = {"left": left_redness}, {"left": 2.0}
STOCHASTIC = range(1, 4)


def _chain(steps: int = 5) -> Chain:
    return sampling_chain(SamplingConfig(steps=steps, shift=2.0, transition="flow", eta=0.7), "velocity")


def _sampled(generator: ToyGenerator, chain: Chain, count: int = 4, stochastic: range = STOCHASTIC) -> Chains:
    conditioning = {"shift": torch.linspace(-0.2, 0.2, count)}
    keys = [("meter test", i) for i in range(count)]
    trajectory = rollout(generator, conditioning, chain, stochastic, keys, keys)
    return Chains(tuple(range(count)), conditioning, trajectory, [""] * count, [{}] * count)


def _pathwise(
    generator: ToyGenerator, chains: Chains, chain: Chain, stochastic: range = STOCHASTIC
) -> dict[int, Tensor]:
    found = total_gradient(generator, chains, REWARDS, WEIGHTS)
    parameters = list(generator.network.parameters())
    swept = pathwise_gradients(generator, chains, chain, stochastic, parameters, found)
    return {step: flat(own) for step, own in swept}


def test_pathwise_gradient_equals_finite_differences_under_common_noise() -> None:
    generator, chain = ToyGenerator(), _chain()
    whole = sum(_pathwise(generator, _sampled(generator, chain), chain).values())
    theta = torch.nn.utils.parameters_to_vector(generator.network.parameters()).detach()

    def expected(weights: Tensor) -> float:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(weights, generator.network.parameters())
        clean = _sampled(generator, chain).trajectory.clean
        return float(WEIGHTS["left"] * left_redness(generator.decode(clean), [], []).double().mean())

    for place in (0, 7, 20, 36, 37, 38, 39):
        unit = torch.zeros_like(theta)
        unit[place] = 1e-2
        assert float(whole[place]) == pytest.approx((expected(theta + unit) - expected(theta - unit)) / 2e-2, abs=2e-4)


def test_pathwise_gradient_equals_one_graph_through_the_whole_chain() -> None:
    """With ODE steps among the stochastic ones, and the last one, which is always deterministic."""
    generator, chain = ToyGenerator(), _chain()
    chains = _sampled(generator, chain)
    x, states = chains.trajectory.latents[:, 0], chains.trajectory.latents
    for step in range(chain.steps):
        prediction = generator.predict(x, chain.times[step].expand(4), chains.conditioning)
        if step in STOCHASTIC:
            mean, _ = chain.gaussian(x, prediction, torch.full((4,), step))
            x = mean + (states[:, step + 1] - mean).detach()
        else:
            x = chain.ode(x, prediction, step)
    torch.testing.assert_close(x, chains.trajectory.clean)
    reward = (2.0 * left_redness(generator.decode(x), [], [])).mean()
    expected = flat(torch.autograd.grad(reward, list(generator.network.parameters())))
    found = _pathwise(generator, chains, chain)
    assert list(found) == [4, 3, 2, 1, 0]
    torch.testing.assert_close(sum(found.values()), expected)


def test_update_gradient_equals_the_explicit_loop() -> None:
    generator, chain = ToyGenerator(), _chain()
    chains = _sampled(generator, chain)
    draw = torch.Generator().manual_seed(1)
    placed = {
        "map": torch.rand(4, 4, 4, generator=draw) * torch.tensor([1.0, -1.0, 0.5, -0.5]).reshape(4, 1, 1),
        "grpo": torch.tensor([1.0, -1.0, 0.5, -0.5]).reshape(4, 1, 1),
    }
    found = {
        name: flat(own)
        for name, own in update_gradients(generator, chains, chain, 2, list(generator.network.parameters()), placed)
    }
    for name, advantages in placed.items():
        total = torch.zeros(())
        for i in range(4):
            latents = chains.trajectory.latents[i : i + 1, 2]
            shift = {"shift": chains.conditioning["shift"][i : i + 1]}
            mean, std = chain.gaussian(latents, generator.predict(latents, chain.times[2:3], shift), torch.tensor([2]))
            log_prob = position_log_prob(chains.trajectory.latents[i : i + 1, 3], mean, std)[0]
            for y in range(4):
                for x in range(4):
                    total = total + advantages.expand(4, 4, 4)[i, y, x] * log_prob[y, x] / (4 * 16)
        expected = flat(torch.autograd.grad(total, list(generator.network.parameters())))
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_score_function_and_pathwise_gradients_agree() -> None:
    """Two estimators of one gradient: GRPO's direction over many samples is the pathwise gradient of trained steps.

    The last step has no density: what it adds pathwise is no part of what an update sees.
    """
    generator, chain, count = ToyGenerator(), _chain(), 20000
    stochastic = range(4)
    conditioning = {"shift": torch.zeros(count)}
    draw = torch.Generator().manual_seed(2)

    def drawn() -> Chains:
        # As `rollout` samples, from one generator: keyed draws of so many samples take a minute.
        with torch.no_grad():
            x = torch.randn(count, 2, 4, 4, generator=draw)
            states = [x]
            for step in stochastic:
                prediction = generator.predict(x, chain.times[step].expand(count), conditioning)
                mean, std = chain.gaussian(x, prediction, torch.full((count,), step))
                x = mean + std * torch.randn(x.shape, generator=draw)
                states.append(x)
            clean = chain.ode(x, generator.predict(x, chain.times[4].expand(count), conditioning), 4)
        from vipo.sampling.rollout import Trajectory

        latents = torch.stack(states, dim=1)
        return Chains(
            tuple(range(count)), conditioning, Trajectory(latents, latents[:, 1:], clean), [""] * count, [{}] * count
        )

    first, second = drawn(), drawn()
    pathwise = _pathwise(generator, first, chain, stochastic)
    trained = sum(own for step, own in pathwise.items() if step in stochastic)
    reward = 2.0 * left_redness(generator.decode(second.trajectory.clean), [], [])
    placed = {"grpo": (reward - reward.mean()).reshape(-1, 1, 1)}
    parameters = list(generator.network.parameters())
    score = torch.zeros_like(trained)
    for step in stochastic:
        ((_, own),) = update_gradients(generator, second, chain, step, parameters, placed)
        # The mean over positions and channels, where the density of a sample is their sum.
        score += flat(own) * 32
    torch.testing.assert_close(score, trained, rtol=0.1, atol=0.03 * float(trained.abs().max()))
    assert float(torch.nn.functional.cosine_similarity(score, trained, dim=0)) > 0.99


def test_what_hands_no_gradient_on_is_named() -> None:
    generator, chain = ToyGenerator(), _chain()
    chains = _sampled(generator, chain)
    with pytest.raises(MeterError, match="'steps' has no gradient"):
        total_gradient(
            generator, chains, {"steps": lambda images, *_: images.detach().mean(dim=(1, 2, 3))}, {"steps": 1}
        )
    generator.decode = torch.no_grad()(generator.decode)
    with pytest.raises(MeterError, match="decode cuts"):
        total_gradient(generator, chains, REWARDS, WEIGHTS)


def test_a_sketch_keeps_inner_products_within_its_stated_error() -> None:
    draw = torch.Generator().manual_seed(3)
    a, b = torch.randn(5000, generator=draw), torch.randn(5000, generator=draw)
    b = 0.5 * a + b
    exact = float(products([a], b[None]))
    assert exact == pytest.approx(float(a.double() @ b.double()), rel=1e-6)
    cosine, errors = exact / float(a.norm() * b.norm()), []
    for seed in range(60):
        sketch = CountSketch(5000, 512, seed)
        sketched = float(products([sketch(a)], sketch(b)[None]))
        errors.append(sketched / float(a.norm() * b.norm()) - cosine)
    spread = torch.tensor(errors)
    # Unbiased, and spread as stated: sqrt((1 + cos^2) / size), at most `error`.
    expected = ((1 + cosine**2) / 512) ** 0.5
    assert expected < CountSketch(10, 512, 0).error
    assert float(spread.std()) == pytest.approx(expected, rel=0.25)
    assert abs(float(spread.mean())) < 3 * expected / 60**0.5


def test_a_sketch_is_linear_and_keyed() -> None:
    draw = torch.Generator().manual_seed(4)
    a, b = torch.randn(300, generator=draw), torch.randn(300, generator=draw)
    sketch = CountSketch(300, 64, 7)
    torch.testing.assert_close(sketch(a) + 2 * sketch(b), sketch(a + 2 * b))
    assert torch.equal(sketch(a), CountSketch(300, 64, 7)(a))
    assert not torch.equal(sketch(a), CountSketch(300, 64, 8)(a))


def test_whole_gradients_are_kept_where_they_fit() -> None:
    space, told = choose_space(1000, 10, 40_000, seed=0)
    assert isinstance(space, Whole)
    assert space(torch.ones(1000)).shape == (1000,)
    assert "whole gradients: 10" in told
    space, told = choose_space(1_000_000, 10, 2**20, seed=0)
    assert space.size == 2**14
    assert 4 * space.size * 10 <= 2**20
    assert "sketched to 16,384" in told
    assert space(torch.ones(1_000_000)).shape == (2**14,)
