"""Section `tracking`."""

from typing import Annotated

from pydantic import Field, field_validator

from vipo.config.registries import TRACKERS, registered
from vipo.config.section import LARGEST_INT, Section


class TrackingConfig(Section):
    """Where a run can be watched while it trains; outside every identity, so a change trains nothing again."""

    trackers: tuple[str, ...] = Field(
        ("tensorboard",),
        strict=False,
        description="What shows the run beside metrics.jsonl: 'tensorboard', 'wandb', 'mlflow', or import paths "
        "'package.module:object'.",
    )
    sheet_every: Annotated[int, Field(ge=1, le=LARGEST_INT)] | None = Field(
        10, description="Updates between two sheets of samples with their maps, after the first update's; null: none."
    )

    @field_validator("trackers")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"a tracker is named twice: {', '.join(value)}")
        return tuple(registered(name, TRACKERS, "tracker") for name in value)
