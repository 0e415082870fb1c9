"""Section `evaluation`."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from vipo.config.reward import RewardSpec, check_labels
from vipo.config.section import MOST_EVALUATED, PositiveInt, Section, Seed

REPORTED = frozenset({"bootstrap", "confidence", "shown_prompts"})
"""What of section `evaluation` the report alone reads: it changes no sample and no score."""


class EvaluationConfig(Section):
    """Held-out comparison: the same prompts and noise for every arm."""

    prompts: Annotated[int, Field(ge=2, le=MOST_EVALUATED)] = Field(
        40, description="Held-out prompts used (all, where fewer exist); intervals need two."
    )
    samples_per_prompt: PositiveInt = 2
    steps: Annotated[int, Field(ge=1, le=1000)] = Field(20, description="ODE steps.")
    batch: PositiveInt = 16
    rewards: tuple[RewardSpec, ...] = Field(
        (),
        strict=False,
        description="Rewards that are reported: names, labels of trained terms, or name, label and options. Those that "
        "are trained are added by themselves.",
    )
    weights: Literal["trained", "ema"] = Field(
        "trained", description="Which of a run's weights are evaluated, and handed over; ema: training.ema_decay's."
    )
    seed: Seed = 1234
    bootstrap: Annotated[int, Field(ge=100, le=10**5)] = 2000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    shown_prompts: PositiveInt = Field(6, description="Prompts shown side by side in an exported card.")

    @field_validator("rewards")
    @classmethod
    def _distinct(cls, value: tuple[RewardSpec, ...]) -> tuple[RewardSpec, ...]:
        check_labels(value)
        return value

    @model_validator(mode="after")
    def _ends(self) -> Self:
        samples = self.prompts * self.samples_per_prompt
        if samples > MOST_EVALUATED:
            raise ValueError(
                f"prompts {self.prompts} * samples_per_prompt {self.samples_per_prompt} is {samples} samples, more "
                f"than the {MOST_EVALUATED} that are held; lower one of them"
            )
        return self
