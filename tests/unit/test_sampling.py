"""Schedules and transitions against closed forms, stock schedulers and torch.distributions."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vipo.sampling.schedule import sigma_schedule
from vipo.sampling.transitions import (
    cps_transition,
    dance_transition,
    ddim_transition,
    euler_step,
    flow_transition,
    position_kl,
    position_log_prob,
    v_transition,
)

SHAPES = [(3, 4, 5, 6), (3, 4, 2, 5, 6)]
FLOW = {"dance": dance_transition, "flow": partial(flow_transition, sigma_second=0.9), "cps": cps_transition}


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


def _step(seed: int = 0, shape: tuple[int, ...] = SHAPES[0]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(shape, generator=generator),
        "velocity": torch.randn(shape, generator=generator),
        "sigma": torch.tensor([1.0, 0.7, 0.2]),
        "sigma_next": torch.tensor([0.9, 0.45, 0.1]),
    }


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.ndim - 1)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FLOW)
def test_shapes_of_a_transition(name: str, shape: tuple[int, ...]) -> None:
    """Images and videos: the mean like the latents, one std per sample; a sample's step reads that sample alone."""
    step = _step(shape=shape)
    mean, std = FLOW[name](**step, eta=0.4)
    assert mean.shape == shape
    assert std.shape == (3, *([1] * (len(shape) - 1)))
    for i in range(3):
        alone = FLOW[name](**{key: value[i : i + 1] for key, value in step.items()}, eta=0.4)
        torch.testing.assert_close(alone[0][0], mean[i])
        torch.testing.assert_close(alone[1][0], std[i])


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


@pytest.mark.parametrize("shape", SHAPES)
def test_flow_transition_is_flow_grpos(shape: tuple[int, ...]) -> None:
    """Flow-GRPO writes the step with a negative dt and collects the terms of x and of v."""
    step, a = _step(shape=shape), 0.7
    second = float(step["sigma_next"][0])
    mean, std = flow_transition(**step, eta=a, sigma_second=second)
    for i in range(3):
        x, v = step["latents"][i].double(), step["velocity"][i].double()
        sigma, dt = float(step["sigma"][i]), float(step["sigma_next"][i]) - float(step["sigma"][i])
        deviation = a * math.sqrt(sigma / (1 - (second if sigma == 1 else sigma)))
        of_x = 1 + deviation**2 / (2 * sigma) * dt
        of_v = (1 + deviation**2 * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(mean[i].double(), of_x * x + of_v * v, atol=5e-6, rtol=0)
        assert float(std[i]) == pytest.approx(deviation * math.sqrt(-dt), rel=1e-5)
    # The first step divides by 1 - sigma_1, its numerator stays 1.
    assert float(std[0]) == pytest.approx(a * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1), rel=1e-5)


@settings(deadline=None)
@given(sigma=st.floats(0.05, 1), share=st.floats(0.05, 0.95), eta=st.floats(0, 1), spread=st.floats(0.1, 3))
def test_cps_keeps_the_schedules_coefficients(sigma: float, share: float, eta: float, spread: float) -> None:
    """With x0 of any variance and the exact x0 and noise, the next state has variance (1 - s')^2 var(x0) + s'^2."""
    sigma_next = share * sigma
    # The transition is linear: its response to x0 = 1, noise = 0 and to x0 = 0, noise = 1 are the coefficients.
    clean, noise = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    mixed, velocity = (1 - sigma) * clean + sigma * noise, noise - clean
    levels = [torch.tensor([value], dtype=torch.float64) for value in (sigma, sigma_next)]
    mean, std = cps_transition(mixed[None, None], velocity[None, None], *levels, eta)
    of_clean, of_noise = mean.flatten().tolist()
    variance = (of_clean * spread) ** 2 + of_noise**2 + float(std) ** 2
    assert variance == pytest.approx(((1 - sigma_next) * spread) ** 2 + sigma_next**2, rel=1e-9)
    assert of_clean == pytest.approx(1 - sigma_next, abs=1e-12)
    assert float(std) == pytest.approx(sigma_next * math.sin(eta * math.pi / 2), abs=1e-12)


@pytest.mark.parametrize("name", FLOW)
def test_without_noise_every_flow_transition_is_the_ode_step(name: str) -> None:
    step = _step()
    mean, std = FLOW[name](**step, eta=0.0)
    torch.testing.assert_close(mean, euler_step(**step), atol=1e-6, rtol=0)
    dt = (step["sigma"] - step["sigma_next"])[:, None, None, None]
    torch.testing.assert_close(mean, step["latents"] - dt * step["velocity"], atol=1e-6, rtol=0)
    assert float(std.abs().max()) == 0


def test_euler_step_is_the_stock_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 6, 6))
    sigmas, x = sigma_schedule(6, 3.0), _step()["latents"]
    stock = x
    for i, time in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * x)
        stock = scheduler.step(velocity, time, stock, return_dict=False)[0]
        x = euler_step(x, velocity, sigmas[i].expand(3), sigmas[i + 1].expand(3))
        torch.testing.assert_close(x, stock, atol=2e-6, rtol=0)


# Stable Diffusion 1.5's schedule.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _assert_is_a_step_of(
    scheduler: DDIMScheduler, transition: Callable[..., tuple[Tensor, Tensor]], eta: float, time: int
) -> None:
    """One step of 50 that begins at `time`."""
    scheduler.set_timesteps(50)
    step = _step(time)
    x, predicted = step["latents"], step["velocity"]
    alphas = [scheduler.alphas_cumprod[t].expand(3) for t in (time, time - 20)]
    mean, std = transition(x, predicted, *alphas, eta)
    # The stock step is mean + std * variance_noise.
    at_zero, at_one = (
        scheduler.step(predicted, time, x, eta=eta, variance_noise=torch.full_like(x, value)).prev_sample
        for value in (0.0, 1.0)
    )
    torch.testing.assert_close(mean, at_zero, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std.expand_as(x), at_one - at_zero, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("time", [981, 501, 41, 21])
def test_ddim_transition_is_the_stock_schedulers(eta: float, time: int) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    _assert_is_a_step_of(scheduler, ddim_transition, eta, time)


# At 1 the stock step takes the root of 0 from there, or of what its rounding leaves below 0.
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("time", [999, 499, 39])
def test_v_transition_is_the_stock_schedulers(eta: float, time: int) -> None:
    """From a first timestep without signal too."""
    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    _assert_is_a_step_of(scheduler, v_transition, eta, time)


def test_with_eta_one_nothing_of_a_first_noise_without_signal_is_left() -> None:
    """Whatever the rounding of 1 - alpha' - std^2, which is 0."""
    step = _step(0)
    for after in torch.linspace(1e-4, 1 - 1e-4, 50):
        mean, std = v_transition(step["latents"], step["velocity"], torch.zeros(3), after.expand(3), 1.0)
        torch.testing.assert_close(mean, -after.sqrt() * step["velocity"], atol=2e-3, rtol=0)
        torch.testing.assert_close(std.flatten(), (1 - after).sqrt().expand(3), atol=1e-6, rtol=0)


def test_ddim_with_eta_one_is_ddpm() -> None:
    """One training timestep down: the posterior of DDPM, mean and variance."""
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    step = _step()
    for time in (999, 400, 5):
        alpha, alpha_next = (scheduler.alphas_cumprod[t].double() for t in (time, time - 1))
        x, noise = step["latents"].double(), step["velocity"].double()
        mean, std = ddim_transition(x, noise, alpha.expand(3), alpha_next.expand(3), 1.0)
        beta = 1 - alpha / alpha_next
        torch.testing.assert_close(std.flatten()[0].square(), beta * (1 - alpha_next) / (1 - alpha), atol=0, rtol=1e-9)
        # Ho et al., equation 11.
        expected = (x - beta / (1 - alpha).sqrt() * noise) / (1 - beta).sqrt()
        torch.testing.assert_close(mean, expected, atol=1e-9, rtol=1e-9)


def _ends_with(transition: Callable[..., tuple[Tensor, Tensor]], sigmas: Tensor, eta: float, spread: float) -> float:
    """Std of the last noised state of a chain on data N(0, spread^2), whose exact velocity is known."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 100, 100, generator=generator)
    for s, s_next in itertools.pairwise(sigmas[:-1]):
        velocity = x * (s - (1 - s) * spread**2) / (s**2 + (1 - s) ** 2 * spread**2)
        mean, std = transition(x, velocity, s.expand(4), s_next.expand(4), eta)
        x = mean + std * torch.randn(x.shape, generator=generator)
    return float(x.std())


@pytest.mark.parametrize(
    ("name", "eta", "spread"),
    [("dance", 0.5, 1.0), ("dance", 0.5, 0.4), ("flow", 0.4, 1.0), ("flow", 0.4, 0.4), ("cps", 0.5, 0.0)],
)
def test_marginals_are_kept(name: str, eta: float, spread: float) -> None:
    """On Gaussian data the exact velocity is known: the chain ends with the schedule's variance.

    Of `cps`, whose noise does not shrink with the step, only where the network knows x0 (data of one point).
    """
    sigmas = sigma_schedule(400, 1.0)
    transition = FLOW[name] if name != "flow" else partial(flow_transition, sigma_second=float(sigmas[1]))
    last = float(sigmas[-2])
    expected = math.hypot((1 - last) * spread, last)
    assert _ends_with(transition, sigmas, eta, spread) == pytest.approx(expected, rel=0.02)


def test_ddim_keeps_its_marginals() -> None:
    """On data N(0, spread^2) the exact noise prediction is linear in x."""
    alphas, spread = DDIMScheduler(**BETAS).alphas_cumprod.flip(0)[::4], 0.4
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 100, 100, generator=generator)
    for a, a_next in itertools.pairwise(alphas):
        noise = x * (1 - a).sqrt() / (a * spread**2 + 1 - a)
        mean, std = ddim_transition(x, noise, a.expand(2), a_next.expand(2), 1.0)
        x = mean + std * torch.randn(x.shape, generator=generator)
    expected = float((alphas[-1] * spread**2 + 1 - alphas[-1]).sqrt())
    assert float(x.std()) == pytest.approx(expected, rel=0.03)


def test_clean_estimate_recovers_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    sigma = torch.tensor([0.8, 0.3])
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
    torch.testing.assert_close(euler_step(mixed, noise - clean, sigma, torch.zeros(2)), clean, atol=1e-6, rtol=0)
    alpha = torch.tensor([0.1, 0.8])
    mixed = _column(alpha.sqrt(), clean) * clean + _column((1 - alpha).sqrt(), clean) * noise
    for eta in (0.0, 1.0):
        found, std = ddim_transition(mixed, noise, alpha, torch.ones(2), eta)
        torch.testing.assert_close(found, clean, atol=2e-6, rtol=0)
        assert float(std.max()) == 0


@settings(deadline=None)
@given(seed=st.integers(0, 1000), std=st.floats(0.01, 3), shape=st.sampled_from([(2, 3, 4, 5), (2, 3, 2, 4, 5)]))
def test_log_prob_is_the_normal_density(seed: int, std: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    value, mean = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    column = torch.full((2, *([1] * (len(shape) - 1))), std)
    reference = Normal(mean.double(), column.double()).log_prob(value.double())
    found = position_log_prob(value, mean, column)
    assert found.shape == (2, *shape[2:])
    torch.testing.assert_close(found.double(), reference.mean(dim=1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        found.double().flatten(1).mean(dim=1), reference.flatten(1).mean(dim=1), atol=1e-4, rtol=1e-5
    )
    # The channels' sum is the density of the whole position.
    found = position_log_prob(value, mean, column, "sum")
    torch.testing.assert_close(found.double(), reference.sum(dim=1), atol=1e-3, rtol=1e-5)
    # Flow-CPS's public code: no variance, no constant.
    found = position_log_prob(value, mean, column, "mean", "squared_error")
    expected = -(value.double() - mean.double()).pow(2).mean(dim=1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_squared_error_is_the_density_of_std_sqrt_one_half() -> None:
    """So its ratio's scale is that of a Gaussian of variance 1/2, whatever the transition's own std."""
    value, mean = _step()["latents"], _step()["velocity"]
    other = mean + 0.1
    unscaled = [position_log_prob(value, m, torch.tensor(0.05), "mean", "squared_error") for m in (mean, other)]
    gaussian = [position_log_prob(value, m, torch.tensor(0.5**0.5)) for m in (mean, other)]
    torch.testing.assert_close(unscaled[1] - unscaled[0], gaussian[1] - gaussian[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [4, 16])
def test_scale_of_the_log_ratio(channels: int) -> None:
    """A small change d of the mean: std |d| / std of one element, sqrt(C) less or more per position, and
    another sqrt(positions) less for the sample's mean."""
    generator = torch.Generator().manual_seed(0)
    shape, std, size = (64, channels, 16, 16), torch.tensor(0.3), 1e-3
    mean, noise, change = (torch.randn(shape, generator=generator) for _ in range(3))
    value = mean + std * noise
    element = size / 0.3
    expected = {"mean": element / channels**0.5, "sum": element * channels**0.5}
    for reduction, scale in expected.items():
        old, new = (position_log_prob(value, m, std, reduction) for m in (mean, mean + size * change))
        log_ratio = new - old
        assert float(log_ratio.std()) == pytest.approx(scale, rel=0.05)
        assert float(log_ratio.mean(dim=(1, 2)).std()) == pytest.approx(scale / 16, rel=0.3)


@pytest.mark.parametrize(("reduction", "low", "high"), [("mean", 1e-5, 3e-5), ("sum", 1.5e-4, 3.5e-4)])
def test_rounding_in_the_mean_reaches_the_log_ratio_over_std(reduction: str, low: float, high: float) -> None:
    """What docs/method.md says of the on-policy check: the paper's chain, C = 16, 64 x 64, a relative 1e-6."""
    generator = torch.Generator().manual_seed(0)
    levels = sigma_schedule(8, 3.0)
    for std in (0.3 * (levels[:-1] - levels[1:]).sqrt())[:-1]:
        mean, noise, change = (torch.randn(4, 16, 64, 64, generator=generator) for _ in range(3))
        value, moved = mean + std * noise, mean.double() * (1 + 1e-6 * change.double())
        old, new = (position_log_prob(value.double(), m, std.double(), reduction) for m in (mean.double(), moved))
        log_ratio = (new - old).double().abs()
        spread = 1e-6 / float(std) * (0.25 if reduction == "mean" else 4)
        assert float(log_ratio.square().mean().sqrt()) == pytest.approx(spread, rel=0.05)
        largest = float(log_ratio.flatten(1).amax(dim=1).mean())
        assert 0.9 * low < largest < high
        assert 5 < largest / spread < 7


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    std=st.floats(0.01, 3),
    channels=st.sampled_from(["mean", "sum"]),
    shape=st.sampled_from([(2, 3, 4, 5), (2, 3, 2, 4, 5)]),
)
def test_kl_is_the_closed_form(seed: int, std: float, channels: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean, reference = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    column = torch.full((2, *([1] * (len(shape) - 1))), std, dtype=torch.float64)
    element = kl_divergence(Normal(mean, column), Normal(reference, column))
    expected = element.mean(dim=1) if channels == "mean" else element.sum(dim=1)
    found = position_kl(mean, reference, column, channels)
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, *shape[2:])
    assert bool((position_kl(mean, mean, column, channels) == 0).all())


def test_gradient_of_kl_reaches_the_mean_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, reference = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.1, 0.4], dtype=torch.float64).reshape(2, 1, 1, 1)
    values = mean.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: position_kl(m, reference, std).mean(), values)
    (gradient,) = torch.autograd.grad(position_kl(values, reference, std).sum(), values)
    torch.testing.assert_close(gradient, (mean - reference) / std**2 / 3)


def test_shapes_are_checked() -> None:
    step = _step()
    others = {ddim_transition: "noise", v_transition: "v"}
    for transition in (*FLOW.values(), *others):
        told = others.get(transition, "velocity")
        level = "alpha" if transition in others else "sigma"
        x, v, s, s_next = step.values()
        with pytest.raises(ValueError, match=rf"{told}: expected shape \(3, 4, 5, 6\) of the latents, got \(1, 4, 5"):
            transition(x, v[:1], s, s_next, 0.3)
        with pytest.raises(ValueError, match=rf"{level}: expected shape \(3,\)"):
            transition(x, v, s[:1], s_next[:1], 0.3)
    with pytest.raises(ValueError, match="value: expected shape"):
        position_log_prob(step["latents"], step["latents"][:1], torch.ones(1))
    with pytest.raises(ValueError, match="reference_mean: expected shape"):
        position_kl(step["latents"], step["latents"][:1], torch.ones(1))
    with pytest.raises(ValueError, match="velocity: expected shape"):
        euler_step(step["latents"], step["velocity"][:1], step["sigma"], step["sigma_next"])
