"""What a checkpoint's scheduler says of times and noise levels, and which of its settings are not held."""

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError, Prediction
from vipo.generators.parts import AGAIN, load_part

log = logging.getLogger(__name__)

# Each replaces the levels between noise and data by others.
_OTHER_LEVELS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "invert_sigmas",
)


@dataclass(frozen=True)
class NoiseSchedule:
    """What a variance-preserving checkpoint was trained with.

    Attributes:
        alphas_cumprod: ``(timesteps,)`` float32.
        timesteps: from the number of steps T to the ``(T,)`` int64 timesteps that they visit, from noise to data.
        prediction: of the network.
    """

    alphas_cumprod: Tensor
    timesteps: Callable[[int], Tensor]
    prediction: Prediction


def noise_schedule(
    location: Path | str, index: Mapping[str, Any], config: GeneratorConfig, kind: Any = DDIMScheduler
) -> NoiseSchedule:
    """The schedule of a checkpoint that predicts noise or v; its timesteps are the stock scheduler's, or an error.

    Args:
        location: folder or hub id.
        index: content of ``model_index.json``.
        config: section `generator`.
        kind: the family's scheduler of the DDIM chain.

    Raises:
        GeneratorError: the scheduler is missing or damaged, or has a setting that the chain does not hold.
    """
    place = f"{location}/scheduler/scheduler_config.json"
    entry = index.get("scheduler")
    name = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "none"
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise GeneratorError(f"{location}/model_index.json: scheduler class {name!r} is none of diffusers'")
    named: Any = found
    ddim, stock = (
        load_part(each.from_pretrained, location, "scheduler", config, weights=False) for each in (kind, named)
    )
    settings = ddim.config
    predictions: Mapping[str, Prediction] = {"epsilon": "noise", "v_prediction": "v"}
    if settings.prediction_type not in predictions:
        raise GeneratorError(
            f"{place}: prediction_type {settings.prediction_type!r}; vipo trains networks that predict noise "
            "('epsilon') or v ('v_prediction')"
        )
    if settings.timestep_spacing not in ("leading", "trailing", "linspace"):
        raise GeneratorError(
            f"{place}: timestep_spacing {settings.timestep_spacing!r} is not 'leading', 'trailing' or 'linspace'"
        )
    for key in ("thresholding", "rescale_betas_zero_snr"):
        # Without signal at the first timestep there is no x0 to be had from the noise, but from v there is.
        if settings.get(key) and (key == "thresholding" or settings.prediction_type == "epsilon"):
            raise GeneratorError(f"{place}: {key} {settings[key]!r} is not held; set it to false")

    # StableDiffusionPipeline itself switches it off, and CogVideoX's schedulers have it and never read it.
    reads = index.get("_class_name") != "StableDiffusionPipeline" and not name.startswith("CogVideoX")
    if reads and stock.config.get("clip_sample") and "clip_sample" in inspect.signature(named.__init__).parameters:
        raise GeneratorError(
            f"{place}: clip_sample {stock.config.clip_sample!r} (by default, where it is not there): the stock chain "
            "would cut latents off, which vipo's does not; set it to false"
        )

    def timesteps(steps: int) -> Tensor:
        try:
            ddim.set_timesteps(steps)
            stock.set_timesteps(steps)
        except Exception as error:
            raise GeneratorError(f"{place}: {name} has no chain of {steps} steps: {error}") from error
        # PNDM visits one of them twice.
        ours, visited = ddim.timesteps.tolist(), list(dict.fromkeys(stock.timesteps.tolist()))
        if ours != visited:
            keys = [key for key in _OTHER_LEVELS if stock.config.get(key)]
            raise GeneratorError(
                f"{place}: _class_name {name!r}{' with ' + ', '.join(keys) if keys else ''} visits other timesteps in "
                f"{steps} steps than DDIM, by which vipo samples (first {visited[:3]} and {ours[:3]}); name "
                "'DDIMScheduler' there and in model_index.json"
            )
        falls = all(a > b for a, b in itertools.pairwise(ours))
        if len(ours) != steps or not falls or not 0 <= ours[-1] <= ours[0] < len(ddim.alphas_cumprod):
            raise GeneratorError(
                f"{place}: timestep_spacing {settings.timestep_spacing!r} with steps_offset {settings.steps_offset} "
                f"makes of {steps} steps the timesteps {ours[0]} to {ours[-1]}, outside 0 to "
                f"{len(ddim.alphas_cumprod) - 1} or not {steps} different ones; take fewer steps"
            )
        return torch.tensor(ours)

    return NoiseSchedule(ddim.alphas_cumprod.float(), timesteps, predictions[settings.prediction_type])


def flow_settings(location: Path | str, config: GeneratorConfig) -> Mapping[str, Any]:
    """Settings of a flow-matching checkpoint's scheduler.

    Raises:
        GeneratorError: the scheduler is missing or damaged, or has a setting that the chain does not hold.
    """
    place = f"{location}/scheduler/scheduler_config.json"
    settings: Mapping[str, Any] = load_part(
        FlowMatchEulerDiscreteScheduler.load_config, location, "scheduler", config, weights=False
    )
    if not str(settings.get("_class_name")).startswith("FlowMatch"):
        if settings.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise GeneratorError(
                f"{place}: prediction_type {settings['prediction_type']!r}; this family predicts velocities "
                "('flow_prediction')"
            )
        if not settings.get("use_flow_sigmas"):
            raise GeneratorError(f"{place}: use_flow_sigmas is not set, so its levels are not flow matching's")
    for key in _OTHER_LEVELS:
        if settings.get(key):
            raise GeneratorError(
                f"{place}: {key} {settings[key]!r} replaces the levels of the chain, which vipo does not hold; unset it"
            )
    if (count := settings.get("num_train_timesteps", 1000)) != 1000:
        raise GeneratorError(f"{place}: num_train_timesteps {count}; the family's network is called with 1000 sigma")
    if (kind := settings.get("time_shift_type", "exponential")) not in ("exponential", "linear"):
        raise GeneratorError(f"{place}: time_shift_type {kind!r} is not 'exponential' or 'linear'; {AGAIN}")
    if not isinstance(terminal := settings.get("shift_terminal") or 0.0, int | float):
        raise GeneratorError(f"{place}: shift_terminal {terminal!r} is no noise level; {AGAIN}")
    return settings


def check_levels(location: Path | str, config: GeneratorConfig, shifts_by_tokens: bool) -> None:
    """Refuse a flow-matching scheduler that the chain does not hold, and tell what it leaves out.

    Args:
        location: folder or hub id.
        config: section `generator`.
        shifts_by_tokens: whether the family's pipeline shifts by the number of tokens.

    Raises:
        GeneratorError: as `flow_shift`.
    """
    # What it refuses does not depend on the number of tokens.
    flow_shift(location, config, 1 if shifts_by_tokens else None)
    if terminal := flow_settings(location, config).get("shift_terminal"):
        log.warning(
            "%s: the checkpoint's scheduler stretches its noise levels to end at %g before the data; vipo's go by "
            "sampling.shift alone",
            location,
            terminal,
        )


def flow_shift(location: Path | str, config: GeneratorConfig, tokens: int | None = None) -> float:
    """The time shift s of ``s x / (1 + (s - 1) x)`` that a flow-matching checkpoint's scheduler applies.

    Args:
        location: folder or hub id.
        config: section `generator`.
        tokens: of one picture in the network, where the family's pipeline shifts by their number.

    Raises:
        GeneratorError: the scheduler is missing or damaged, or has a setting that the chain does not hold.
    """
    place = f"{location}/scheduler/scheduler_config.json"
    settings = flow_settings(location, config)
    dynamic = bool(settings.get("use_dynamic_shifting"))
    if dynamic and tokens is None:
        raise GeneratorError(f"{place}: use_dynamic_shifting is set, which this family's pipeline does not hold")
    try:
        found = _moved(settings, tokens) if dynamic else float(settings.get("flow_shift", settings.get("shift", 1.0)))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise GeneratorError(f"{place}: its shift cannot be read ({type(error).__name__}: {error}); {AGAIN}") from error
    # Of dynamic shifting the checks ask for a number of tokens that is not the real one.
    if not dynamic and not 0 < found < math.inf:
        raise GeneratorError(f"{place}: its shift is {found:g}, a time shift is above 0 and finite; {AGAIN}")
    return found


def _moved(settings: Mapping[str, Any], tokens: int | None) -> float:
    fewest, most = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    low, high = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
    return dynamic_shift(settings, float(low + ((tokens or 0) - fewest) * (high - low) / (most - fewest)))


def dynamic_shift(settings: Mapping[str, Any], mu: float) -> float:
    """The time shift of a scheduler that shifts dynamically by `mu`."""
    return mu if settings.get("time_shift_type") == "linear" else math.exp(mu)
