"""Group advantages, their allocation over positions, and the clipped surrogate: pure functions."""

from vipo.objectives.advantages import (
    GroupAdvantages,
    allocate_advantages,
    best_and_worst,
    group_advantages,
    weight_maps,
)
from vipo.objectives.surrogate import Surrogate, clipped_surrogate, normalized_log_ratio

__all__ = [
    "GroupAdvantages",
    "Surrogate",
    "allocate_advantages",
    "best_and_worst",
    "clipped_surrogate",
    "group_advantages",
    "normalized_log_ratio",
    "weight_maps",
]
