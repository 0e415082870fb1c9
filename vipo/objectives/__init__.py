"""Objectives and gates: plug-ins. Group advantages: pure functions."""

from vipo.objectives.advantages import (
    Advantages,
    GroupAdvantages,
    allocate_advantages,
    best_and_worst,
    group_advantages,
    step_advantages,
)
from vipo.objectives.gates import Gate, Gated, Moved, load_gate
from vipo.objectives.objective import (
    Objective,
    ObjectiveError,
    Outcome,
    Points,
    Predictions,
    Share,
    checked_outcome,
    checked_points,
    load_objective,
)

__all__ = [
    "Advantages",
    "Gate",
    "Gated",
    "GroupAdvantages",
    "Moved",
    "Objective",
    "ObjectiveError",
    "Outcome",
    "Points",
    "Predictions",
    "Share",
    "allocate_advantages",
    "best_and_worst",
    "checked_outcome",
    "checked_points",
    "group_advantages",
    "load_gate",
    "load_objective",
    "step_advantages",
]
