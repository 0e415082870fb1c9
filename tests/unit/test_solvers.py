"""Deterministic solvers against the stock scheduler and the exact solution of a Gaussian's ODE."""

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from vipo.config.sampling import SamplingConfig
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.solvers import OdeSolver, Solver
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
