"""Deterministic solvers against the stock scheduler and the exact solution of a Gaussian's ODE."""

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from vipo.config.comparable import check_comparable
from vipo.config.compose import load_config
from vipo.config.experiment import check_solver
from vipo.config.generator import GeneratorConfig
from vipo.config.sampling import SamplingConfig, Solver
from vipo.config.validation import ConfigError
from vipo.generators.base import Conditioning, Generator
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.rollout import rollout
from vipo.sampling.solvers import OdeSolver
from vipo.sampling.transitions import dance_transition

SPREAD = 0.3


def _velocity(x: Tensor, sigma: float) -> Tensor:
    """The exact velocity where the data are normal with standard deviation SPREAD."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    return x * (sigma - (1 - sigma) * SPREAD**2) / variance


def _chain(steps: int, shift: float = 3.0) -> Chain:
    return sampling_chain(SamplingConfig(steps=steps, shift=shift), "velocity")


def _sampled(chain: Chain, solver: Solver, x: Tensor) -> Tensor:
    ode = OdeSolver(chain, solver)
    for step in range(chain.steps):
        x = ode.step(x, _velocity(x, float(chain.levels[step])), step)
    return x


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 4, 2, 3, 3)])
def test_it_is_the_stock_scheduler(shape: tuple[int, ...]) -> None:
    stock = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, euler_at_final=True
    )
    stock.set_timesteps(10)
    chain = _chain(10)
    stock.sigmas = chain.levels.double()
    x = noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for step, time in enumerate(stock.timesteps):
        x = stock.step(_velocity(x, float(chain.levels[step])), time, x).prev_sample
    found = _sampled(chain, "dpm2", noise)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
    assert float((found - _sampled(chain, "euler", noise)).abs().max()) > 1e-3


class Gaussian(Generator):
    """The exact velocity of normal data; no weights."""

    network_folder = "none"
    latent_shape = (2, 3, 4)
    device = torch.device("cpu")
    config = GeneratorConfig(path="none", height=2, width=2)

    def _absent(self, *_: object, **__: object) -> None:
        raise NotImplementedError

    load = encode_prompts = decode = add_lora = save_network = load_network = _absent

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return _velocity(latents, float(time[0]))


def _stock(chain: Chain, first: int, x: Tensor, steps: int) -> Tensor:
    """Of a scheduler that begins at step `first`."""
    levels = chain.levels[first:].double()
    stock = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, euler_at_final=True
    )
    stock.set_timesteps(len(levels) - 1)
    stock.sigmas = levels
    for level, time in list(zip(levels, stock.timesteps, strict=False))[:steps]:
        x = stock.step(_velocity(x, float(level)), time, x).prev_sample
    return x


@pytest.mark.parametrize("window", [range(0, 2), range(3, 6), range(7, 9)])
def test_around_a_window_it_is_the_stock_scheduler_before_and_a_fresh_one_after(window: range) -> None:
    chain, keys = _chain(10), [(0, i) for i in range(2)]
    path = rollout(Gaussian(), {}, chain, window, keys, keys, "dpm2")
    euler = rollout(Gaussian(), {}, chain, window, keys, keys)
    before = _stock(chain, 0, path.latents[:, 0], window.start)
    torch.testing.assert_close(path.latents[:, window.start], before, atol=1e-5, rtol=1e-5)
    after = _stock(chain, window.stop, path.latents[:, window.stop], 10 - window.stop)
    torch.testing.assert_close(path.clean, after, atol=1e-5, rtol=1e-5)
    for step in chain.trainable:
        x, mean = path.latents[:, step], path.means[:, step]
        if step in window:
            expected, _ = chain.gaussian(x, _velocity(x, float(chain.levels[step])), torch.full((2,), step))
            assert torch.equal(mean, expected)
        else:
            assert torch.equal(mean, path.latents[:, step + 1])
    # The first step after the window is Euler's; two steps before or after it, there is a second order.
    start = chain.ode(
        path.latents[:, window.stop],
        _velocity(path.latents[:, window.stop], float(chain.levels[window.stop])),
        window.stop,
    )
    if window.stop < 9:
        torch.testing.assert_close(path.latents[:, window.stop + 1], start, atol=1e-6, rtol=1e-6)
    assert float((path.clean - euler.clean).abs().max()) > 1e-3


def test_what_follows_eulers_steps_refuses_another_solver() -> None:
    window = "sampling.window={size: 4, solver: dpm2}"
    check_solver(load_config(["experiment=demo", "arm=vipo", window]))
    with pytest.raises(ConfigError, match=r"credit\.steps 'tweedie': it follows Euler's steps.*set that to euler"):
        check_solver(load_config(["experiment=demo", "arm=step_tweedie", window]))
    with pytest.raises(ConfigError, match=r"sampling\.window\.solver 'dpm2': the meter's gradients follow Euler's"):
        check_comparable({"vipo": load_config(["experiment=demo", "arm=vipo", window])})
    with pytest.raises(ConfigError, match=r"window\.solver 'dpm2' is one of flow matching"):
        load_config(["experiment=demo", "arm=vipo", window, "sampling.transition=ddim"])


def test_eulers_steps_keep_the_identity() -> None:
    identity = load_config(["experiment=demo", "arm=vipo", "sampling.window={size: 4}"]).training_identity()
    assert "solver" not in identity["sampling"]["window"]
    other = load_config(["experiment=demo", "arm=vipo", "sampling.window={size: 4, solver: dpm2}"]).training_identity()
    assert other["sampling"]["window"].pop("solver") == "dpm2"
    assert other == identity


def test_it_is_of_second_order() -> None:
    """From level .9 to .1, where x follows its standard deviation: the error falls by four where steps double."""
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = math.sqrt((0.9**2 * SPREAD**2 + 0.1**2) / (0.1**2 * SPREAD**2 + 0.9**2))

    def errors(solver: Solver) -> list[float]:
        found = []
        for steps in (40, 80, 160):
            levels = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
            chain = Chain(levels[:-1], levels, dance_transition, 0.3, "velocity")
            found.append(abs(float(_sampled(chain, solver, noise)) - exact))
        return found

    euler, dpm2 = errors("euler"), errors("dpm2")
    assert all(second < first / 10 for first, second in zip(euler, dpm2, strict=True))
    assert all(3.5 < coarse / fine < 4.5 for coarse, fine in itertools.pairwise(dpm2))
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in itertools.pairwise(euler))
