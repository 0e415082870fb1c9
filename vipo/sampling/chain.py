"""The sampling chain as a Markov chain: levels, network times, and one step of it, stochastic or not."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vipo.config.sampling import SamplingConfig, WindowConfig
from vipo.errors import VipoError
from vipo.generators.base import Prediction
from vipo.sampling.noise import keyed_generator
from vipo.sampling.schedule import sigma_schedule
from vipo.sampling.transitions import (
    cps_transition,
    dance_transition,
    ddim_transition,
    euler_step,
    flow_transition,
    v_transition,
)

# Of the training timesteps; ten steps of "leading" spacing start above it.
_PURE_NOISE = 0.9

Transition = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class ChainError(VipoError):
    """The chain does not fit the generator; the message names the key and the fix."""


@dataclass(frozen=True)
class Chain:
    """T steps from noise to data.

    The last step is deterministic in every variant: it gives the estimate of x0 that is decoded, rewarded and mapped,
    has no density and is never trained.

    Attributes:
        times: ``(T,)`` float32, what the network is called with at each step.
        levels: ``(T + 1,)`` float32; sigma from 1 to 0, or the cumulative alpha up to 1 where noise or v is predicted.
        transition: mean and std of a stochastic step.
        eta: its noise scale.
        prediction: what the network predicts.
    """

    times: Tensor
    levels: Tensor
    transition: Transition
    eta: float
    prediction: Prediction

    @property
    def steps(self) -> int:
        """T, the network evaluations of a sample."""
        return len(self.times)

    @property
    def trainable(self) -> range:
        """Steps that can have a density: all but the last."""
        return range(self.steps - 1)

    def gaussian(self, latents: Tensor, prediction: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean like `latents` and std ``(B, 1, ...)`` of each sample's stochastic step ``steps[b]``."""
        return self.transition(latents, prediction, self.levels[steps], self.levels[steps + 1], self.eta)

    def ode(self, latents: Tensor, prediction: Tensor, step: int, end: int | None = None) -> Tensor:
        """The deterministic step from `step` to `end`, None being the next one; to T it is the estimate of x0."""
        level, level_next = (self.levels[i].expand(len(latents)) for i in (step, step + 1 if end is None else end))
        if self.prediction == "velocity":
            return euler_step(latents, prediction, level, level_next)
        return self.transition(latents, prediction, level, level_next, 0.0)[0]


def sampling_chain(
    config: SamplingConfig,
    prediction: Prediction,
    alphas_cumprod: Tensor | None = None,
    timesteps: Callable[[int], Tensor] | None = None,
    *,
    device: torch.device | str = "cpu",
    steps: int | None = None,
) -> Chain:
    """The chain that a configuration names, for a generator.

    Args:
        config: section `sampling`.
        prediction: what the generator predicts.
        alphas_cumprod: ``(1000,)``, of a noise-predicting generator's training schedule.
        timesteps: of a noise-predicting generator, the ``(T,)`` timesteps that T steps visit; None: "leading" spacing
            with offset 1, as Stable Diffusion 1.5 and DDPO sample.
        device: where the chain runs.
        steps: T where it is not `config.steps` (evaluation).

    Raises:
        ChainError: transition and generator do not fit.
    """
    count = config.steps if steps is None else steps
    if (prediction != "velocity") != (config.transition == "ddim"):
        fit = "dance, flow or cps" if prediction == "velocity" else "ddim"
        raise ChainError(
            f"sampling.transition: {config.transition!r} does not fit a generator that predicts {prediction}; use {fit}"
        )
    if prediction != "velocity":
        if alphas_cumprod is None:
            raise ChainError(
                f"generator: it predicts {prediction} but names no alphas_cumprod, the schedule it was trained with"
            )
        if count > len(alphas_cumprod):
            raise ChainError(f"sampling.steps: {count} exceeds the {len(alphas_cumprod)} training timesteps")
        times = _leading(count, len(alphas_cumprod)) if timesteps is None else timesteps(count)
        falls = times.shape == (count,) and bool((times.diff() < 0).all())
        if not falls or not 0 <= int(times[-1]) <= int(times[0]) < len(alphas_cumprod):
            raise ChainError(
                f"generator: its timesteps of {count} steps do not fall from one to the next between "
                f"{len(alphas_cumprod) - 1} and 0: {times.flatten()[:3].tolist()}..."
            )
        levels = torch.cat([alphas_cumprod.cpu()[times].float(), torch.ones(1)])
        step = v_transition if prediction == "v" else ddim_transition
        return Chain(times.float().to(device), levels.to(device), step, config.eta, prediction)
    levels = sigma_schedule(count, config.shift)
    transitions: dict[str, Transition] = {
        "dance": dance_transition,
        "flow": partial(flow_transition, sigma_second=float(levels[1])),
        "cps": cps_transition,
    }
    levels = levels.to(device)
    return Chain(levels[:-1], levels, transitions[config.transition], config.eta, prediction)


def _leading(count: int, training: int) -> Tensor:
    spacing = training // count
    # As many steps as training timesteps leave no offset.
    offset = min(1, training - 1 - (count - 1) * spacing)
    return torch.arange(count - 1, -1, -1) * spacing + offset


def chain_remarks(
    chain: Chain,
    config: SamplingConfig,
    flow_shift: float | Callable[[int], float] | None,
    training: int | None,
    section: str = "sampling",
) -> list[str]:
    """In what the chain is not the one that the checkpoint was made for, for the log.

    Args:
        chain: made of `config`.
        config: section `sampling`.
        flow_shift: `Generator.flow_shift`.
        training: of a noise-predicting generator, the number of its training timesteps.
        section: whose key the shift is.
    """
    if chain.prediction == "velocity":
        own = flow_shift(chain.steps) if callable(flow_shift) else flow_shift
        if own is None or math.isclose(own, config.shift, rel_tol=1e-3):
            return []
        steps = f" in {chain.steps} steps" if callable(flow_shift) else ""
        return [
            f"{section}.shift {config.shift:g} is not the checkpoint's: its scheduler shifts by {own:.4g} at this size"
            f"{steps}. Set it to that unless another one is meant"
        ]
    remarks = []
    first = int(chain.times[0])
    if training is not None and first < _PURE_NOISE * training:
        remarks.append(
            f"sampling: {chain.steps} steps start at timestep {first} of {training}, where the network expects "
            f"{float(chain.levels[0]) ** 0.5:.0%} of the picture, but from pure noise; take more steps, or "
            "timestep_spacing 'trailing' in the checkpoint's scheduler"
        )
    if config.shift != SamplingConfig.model_fields["shift"].default:
        remarks.append(f"{section}.shift {config.shift:g} has no effect on a generator that predicts noise")
    return remarks


def stochastic_steps(window: WindowConfig | None, available: int, seed: int, update: int) -> range:
    """The steps of one update that draw noise and can be trained; the others follow the ODE.

    One window serves all samples of an update: windows that differ between samples collapsed training elsewhere.

    Args:
        window: section `sampling.window`; None: every step but the last.
        available: steps that can have a density, T - 1.
        seed, update: key of a window that moves at random.

    Source: MixGRPO (arXiv 2507.21802), sliding windows; Flow-GRPO-Fast, random ones within the first steps.
    """
    if window is None:
        return range(available)
    places = (window.within or available) - window.size + 1
    if window.move == "fixed":
        start = window.start
    elif window.move == "random":
        start = int(torch.randint(places, (), generator=keyed_generator(seed, "window", update)))
    else:
        start = (window.start + (update - 1) // window.every * window.stride) % places
    return range(start, start + window.size)
