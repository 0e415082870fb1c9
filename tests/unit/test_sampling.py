"""Schedules and transitions against closed forms."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from vipo.sampling.schedule import sigma_schedule
from vipo.sampling.transitions import dance_transition, euler_step, position_log_prob


@given(steps=st.integers(1, 60), shift=st.floats(0.2, 10))
def test_schedule_falls_from_one_to_zero(steps: int, shift: float) -> None:
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


@pytest.mark.parametrize(("steps", "shift"), [(8, 3.0), (20, 2.0), (10, 1.0)])
def test_schedule_is_the_stock_schedulers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    torch.testing.assert_close(sigma_schedule(steps, shift), scheduler.sigmas, atol=1e-6, rtol=0)


def test_schedule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="steps 0"):
        sigma_schedule(0, 1.0)


def _step(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 4, 5, 6)
    return {
        "latents": torch.randn(shape, generator=generator),
        "velocity": torch.randn(shape, generator=generator),
        "sigma": torch.tensor([1.0, 0.7, 0.2]),
        "sigma_next": torch.tensor([0.9, 0.45, 0.1]),
    }


def test_dance_transition_equals_the_reverse_sde() -> None:
    step, eta = _step(), 0.7
    mean, std = dance_transition(**step, eta=eta)
    for i in range(3):
        x, v = step["latents"][i].double(), step["velocity"][i].double()
        s, dt = float(step["sigma"][i]), float(step["sigma"][i]) - float(step["sigma_next"][i])
        # With x = (1 - s) x0 + s n the noise is n = x + (1 - s) v, and the marginal's score is -n / s.
        score = -(x + (1 - s) * v) / s
        torch.testing.assert_close(mean[i].double(), x - v * dt + 0.5 * eta**2 * score * dt, atol=2e-6, rtol=0)
        assert float(std[i]) == pytest.approx(eta * dt**0.5, rel=1e-6)


def test_small_eta_is_the_ode_step() -> None:
    step = _step()
    mean, std = dance_transition(**step, eta=1e-6)
    dt = (step["sigma"] - step["sigma_next"])[:, None, None, None]
    torch.testing.assert_close(mean, step["latents"] - dt * step["velocity"], atol=1e-6, rtol=0)
    assert float(std.max()) < 1e-6


def test_marginals_are_kept() -> None:
    """On Gaussian data N(0, 1) the exact velocity is known: the chain ends with the data's variance."""
    generator = torch.Generator().manual_seed(1)
    sigmas = sigma_schedule(400, 1.0)
    x = torch.randn(4, 1, 100, 100, generator=generator)
    for s, s_next in itertools.pairwise(sigmas[:-1]):
        velocity = x * (2 * s - 1) / (s**2 + (1 - s) ** 2)
        mean, std = dance_transition(x, velocity, s.expand(4), s_next.expand(4), 0.5)
        x = mean + std * torch.randn(x.shape, generator=generator)
    assert float(x.std()) == pytest.approx(1.0, abs=0.02)


def test_clean_estimate_recovers_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    sigma = torch.tensor([0.8, 0.3])
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
    torch.testing.assert_close(euler_step(mixed, noise - clean, sigma, torch.zeros(2)), clean, atol=1e-6, rtol=0)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), std=st.floats(0.01, 3))
def test_log_prob_is_the_normal_density(seed: int, std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    value, mean = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    column = torch.full((2, 1, 1, 1), std)
    found = position_log_prob(value, mean, column)
    reference = torch.distributions.Normal(mean.double(), column.double()).log_prob(value.double())
    assert found.shape == (2, 4, 5)
    torch.testing.assert_close(found.double(), reference.mean(dim=1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.double().mean(dim=(1, 2)), reference.mean(dim=(1, 2, 3)), atol=1e-4, rtol=1e-5)


def test_shapes_are_checked() -> None:
    step = _step()
    with pytest.raises(ValueError, match=r"velocity: expected shape \(3, 4, 5, 6\) of the latents, got \(1, 4, 5, 6\)"):
        dance_transition(step["latents"], step["velocity"][:1], step["sigma"], step["sigma_next"], 0.3)
    with pytest.raises(ValueError, match=r"sigma: expected shape \(3,\)"):
        dance_transition(step["latents"], step["velocity"], step["sigma"][:1], step["sigma_next"][:1], 0.3)
    with pytest.raises(ValueError, match="value: expected shape"):
        position_log_prob(step["latents"], step["latents"][:1], torch.ones(1))
