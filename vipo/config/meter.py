"""Section `experiment.meter`."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from vipo.config.section import PositiveFloat, PositiveInt, Section

Direction = Literal["sgd", "sign", "optimizer"]


class MeterConfig(Section):
    """How much `vipo credit` measures, and of what. Samples are drawn as in training (`sampling`, `training`)."""

    arms: tuple[str, ...] = Field(
        ("grpo", "vipo", "contrast", "product", "inverted", "shuffled"),
        min_length=1,
        strict=False,
        description="Whose credit is compared; the first is what the others are compared with.",
    )
    directions: tuple[Direction, ...] = Field(
        ("sgd", "sign", "optimizer"),
        min_length=1,
        strict=False,
        description="What a step makes of the gradient: itself, its sign, the optimizer's own first step.",
    )
    updates: PositiveInt = Field(20, description="Updates (of training.prompts_per_update groups) that are measured.")
    reference: Annotated[int, Field(ge=0, le=10**6)] = Field(
        32,
        description="Batches of training.group_size samples that tell the gradient of the expected reward (pathwise "
        "estimator); 0: none, for rewards without a gradient.",
    )
    blocks: Annotated[int, Field(ge=2, le=64)] = Field(
        8, description="Parts of the reference that are left out in turn for its interval."
    )
    stepped: Annotated[int, Field(ge=0, le=10**6)] = Field(
        4, description="Updates along whose directions steps are taken (directional estimator); 0: none."
    )
    held_out: PositiveInt = Field(12, description="Held-out prompts whose rewards are compared before and after.")
    held_out_samples: PositiveInt = Field(2, description="Samples of each.")
    size: Literal["kl", "prediction", "weights"] = Field(
        "kl",
        description="What is the same for all steps: root of the mean KL divergence of the transitions, root mean "
        "square change of the prediction, or the length of the step.",
    )
    change: PositiveFloat | None = Field(
        None, description="How much of it; null: as much as the optimizer's own first step of the first arm."
    )
    width: PositiveFloat = Field(
        0.3, description="Half-width of a ratio's interval for which the needed number of updates is told."
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    memory_mb: PositiveInt = Field(
        4096, description="For gradients; where whole ones take more they are sketched, of which no step can be taken."
    )

    @field_validator("arms", "directions")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"one is named twice: {', '.join(value)}")
        return value

    @model_validator(mode="after")
    def _measures(self) -> Self:
        if not self.reference and not self.stepped:
            raise ValueError("reference 0 and stepped 0 leave nothing to measure; raise one of them")
        if self.stepped > self.updates:
            raise ValueError(f"stepped {self.stepped} exceeds updates {self.updates}; lower it, or raise updates")
        return self
