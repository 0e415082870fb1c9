"""Group advantages, their allocation over positions, and the clipped surrogate: pure functions."""

from vipo.objectives.advantages import GroupAdvantages, allocate_advantages, group_advantages, weight_maps
from vipo.objectives.surrogate import Surrogate, clipped_surrogate

__all__ = [
    "GroupAdvantages",
    "Surrogate",
    "allocate_advantages",
    "clipped_surrogate",
    "group_advantages",
    "weight_maps",
]
