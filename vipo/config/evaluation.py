"""Section `evaluation`."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from vipo.config.generator import GeneratorConfig
from vipo.config.reward import RewardSpec, check_labels
from vipo.config.sampling import SamplingConfig
from vipo.config.section import MOST_EVALUATED, PositiveInt, Section, Seed

GENERATOR = ("height", "width", "frames", "guidance_scale", "guidance_scale_2")
"""What of section `evaluation` takes the place of section `generator`'s keys, where it is not null."""

INSTEAD = frozenset({*GENERATOR, "shift"})
"""What of it takes the place of another section's keys."""

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
    height: Annotated[int, Field(ge=1, le=2**14)] | None = Field(
        None, description="Of the evaluated samples, in pixels; null: generator.height, which is trained at."
    )
    width: Annotated[int, Field(ge=1, le=2**14)] | None = Field(None, description="As height.")
    frames: Annotated[int, Field(ge=1, le=2**14)] | None = Field(None, description="As height, of videos.")
    guidance_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        None,
        description="Of the evaluated samples; null: generator.guidance_scale. A run may train without classifier-free "
        "guidance, at half the cost, and be judged with it.",
    )
    guidance_scale_2: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        None, description="As guidance_scale, of the network for low noise, where a family has two."
    )
    shift: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = Field(
        None,
        description="Time shift of the evaluated chain; null: sampling.shift. A checkpoint may shift another size "
        "otherwise, which a warning tells.",
    )
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

    def generator_of(self, trained: GeneratorConfig) -> GeneratorConfig:
        """Section `generator` at the size, and with the guidance, that is evaluated.

        Raises:
            ValueError: such a sample is too large, or a picture has no frames.
        """
        if self.frames is not None and trained.frames is None:
            raise ValueError(f"evaluation.frames {self.frames}: the generator makes pictures; set it to null")
        own = {key: value for key in GENERATOR if (value := getattr(self, key)) is not None}
        return GeneratorConfig.model_validate({**trained.model_dump(), **own}) if own else trained

    def sampling_of(self, trained: SamplingConfig) -> SamplingConfig:
        """Section `sampling` with the shift that is evaluated."""
        return trained if self.shift is None else trained.model_copy(update={"shift": self.shift})
