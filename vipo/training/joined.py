"""Several transitions of a micro-batch in one network call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vipo.config.training import TrainingConfig
from vipo.generators import Generator
from vipo.generators.base import Conditioning
from vipo.generators.experts import Experts
from vipo.objectives import Points
from vipo.training.errors import TrainingError


def predict_joined(generator: Generator, points: Sequence[Points], conditioning: Conditioning) -> list[Tensor]:
    """What the generator predicts at several points of the same B samples, by one call of them all.

    Args:
        generator: the policy.
        points: k of them, each with latents ``(B, C, [T,] H, W)`` and times ``(B,)``.
        conditioning: of the B samples.

    Returns:
        k predictions, like the latents; of one point by the call that it is alone.
    """
    if len(points) == 1:
        return [generator.predict(points[0].latents, points[0].times, conditioning)]
    latents, times = (torch.cat(parts) for parts in zip(*((each.latents, each.times) for each in points), strict=True))
    given = {name: torch.cat([value] * len(points)) for name, value in conditioning.items()}
    return list(generator.predict(latents, times, given).chunk(len(points)))


def check_joined(training: TrainingConfig, network: object) -> None:
    """Refuse to join transitions that different networks predict.

    Args:
        training: section `training`.
        network: the generator's.

    Raises:
        TrainingError: the policy is two networks by noise level: in a call that needs both, each computes all of it.
    """
    if training.joined_transitions > 1 and isinstance(network, Experts):
        raise TrainingError(
            f"training.joined_transitions {training.joined_transitions}: this generator has two networks, by noise "
            "level, and one call of several transitions would let each of them compute all; set it to 1"
        )
