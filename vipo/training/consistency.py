"""The on-policy check: rollout and update evaluate the same network, so that every ratio is 1 before the first step."""

import math

import torch
from torch import Tensor

from vipo.config.objective import SurrogateConfig
from vipo.config.run import Config
from vipo.training.errors import TrainingError
from vipo.training.samples import MicroBatch, Sample, named


def check_consistency(
    config: Config, log_ratio: Tensor, batch: MicroBatch, steps: Tensor, samples: list[Sample], number: int
) -> float:
    """The largest ``|log rho|`` of a micro-batch before an update's first optimizer step.

    Args:
        config: its ``training.log_ratio_tolerance`` is what is allowed.
        log_ratio: ``(B, ...)``, of samples or of their positions.
        batch: whose samples these are.
        steps: ``(B,)``, the transition of each.
        samples: all of the update.
        number: of the update.

    Raises:
        TrainingError: it is above the tolerance or not finite; the message names update, transition, place and sample.
    """
    largest, tolerance = float(log_ratio.abs().max()), config.training.log_ratio_tolerance
    if largest <= tolerance:
        return largest
    # NaN counts as the largest.
    row, *place = (int(i) for i in torch.unravel_index(log_ratio.abs().argmax(), log_ratio.shape))
    sample = samples[batch.rows[row]]
    if not math.isfinite(largest):
        raise TrainingError(
            f"update {number}: log rho is not finite at {tuple(place)} of transition {int(steps[row])}, sample "
            f"{named(sample)}: the policy's prediction there is not. The newest checkpoint is the last good "
            "state; a lower optimizer.learning_rate, or generator.precision=fp32, avoids most such cases"
        )
    channels = "its reduction over channels"
    if isinstance(config.objective, SurrogateConfig):
        channels = (
            f"sqrt(channels) for objective.channels 'mean' and times it for 'sum' (here {config.objective.channels!r})"
        )
    training = config.training
    others = ["rollout_batch=null"] if training.rollout_batch else []
    others += ["joined_transitions=1"] if training.joined_transitions > 1 else []
    layout = f", another batch layout: set {' and '.join(f'training.{each}' for each in others)}" if others else ""
    if config.generator.compile != "none":
        layout += ", blocks that round otherwise compiled with gradients than without: set generator.compile=none"
    raise TrainingError(
        f"update {number}: max |log rho| before the first optimizer step is {largest:.3g}, above "
        f"training.log_ratio_tolerance {tolerance:.3g}, at {tuple(place)} of transition {int(steps[row])}, "
        f"sample {named(sample)}. Rollout and update do not evaluate the same network: a dropout or norm layer in "
        f"training mode, another dtype or autocast, a kernel that depends on gradients{layout}. "
        "Rounding alone gives log rho the size of its error in the transition's mean over the transition's std, "
        f"divided by {channels}: docs/method.md tells how to choose the tolerance by it"
    )
