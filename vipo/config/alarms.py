"""Section `alarms`."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from vipo.config.section import LARGEST_INT, Section

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
