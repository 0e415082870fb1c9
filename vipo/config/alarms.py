"""Section `alarms`."""

import re
from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import Field, model_validator

from vipo.config.section import LARGEST_INT, Section

SIGNS = ("dark_share", "bright_share", "edge_density", "colour_entropy", "saturation")
"""What is measured of each sample's pictures, `alarm/NAME`."""

BASE_DISTANCE = "alarm/base_distance"
"""Of runs with training.base_distance."""

_ALARMS = frozenset(f"alarm/{name}" for name in (*SIGNS, "group_diversity"))
_REWARD = re.compile(r"reward/(.+)/mean")

Bound = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]


class AlarmConfig(Section):
    """A bound that stops a run: on any metric of its updates."""

    metric: str = Field(
        min_length=1,
        max_length=200,
        description="alarm/dark_share, or reward/LABEL/mean of a term of weight 0.",
    )
    above: Bound | None = Field(None, description="A larger value is out of bounds.")
    below: Bound | None = Field(None, description="A smaller value is.")
    against_first: bool = Field(
        False, description="The bounds are of the difference to update 1, whose samples the base generator drew."
    )
    updates: Annotated[int, Field(ge=1, le=LARGEST_INT)] = Field(
        1, description="So many updates in a row must be out of bounds."
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.above is None and self.below is None:
            raise ValueError(f"{self.metric}: give above, below or both")
        if self.above is not None and self.below is not None and self.below >= self.above:
            raise ValueError(
                f"{self.metric}: below {self.below:g} and above {self.above:g} leave no value between them"
            )
        return self


class AlarmsConfig(Section):
    """When a run stops itself; outside every identity, so that it goes on from its checkpoint under other bounds."""

    stop: tuple[AlarmConfig, ...] = Field((), strict=False, description="The first that is broken stops the run.")

    def unknown(self, labels: Iterable[str], *, base_distance: bool) -> str | None:
        """Why a bound is of a metric that no update has, as far as is known before the first; None: none is.

        Args:
            labels: of the terms of the reward.
            base_distance: whether updates measure it.
        """
        means = {f"reward/{label}/mean" for label in labels}
        for bound in self.stop:
            name = bound.metric
            if name in _ALARMS or name in means or (base_distance and name == BASE_DISTANCE):
                continue
            if name == BASE_DISTANCE:
                return f"{name!r} is measured where training.base_distance is true; set that"
            if name.startswith("change/"):
                return (
                    f"{name!r} is measured by evaluations, after a run; bound {BASE_DISTANCE}, with "
                    "training.base_distance=true"
                )
            if name.startswith("alarm/") or _REWARD.fullmatch(name):
                return f"there is no metric {name!r}; choose one of {', '.join(sorted(_ALARMS | means))}"
        return None
