"""Section `experiment.meter`."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from vipo.config.section import PositiveFloat, PositiveInt, Section
from vipo.config.validation import ConfigError

Direction = Literal["sgd", "sign", "optimizer"]

_CHECKPOINT = r"(?P<run>[a-z0-9][a-z0-9_.]*-s[0-9]+)(@(?P<update>[1-9][0-9]*))?"
Checkpoint = Annotated[str, StringConstraints(pattern=r"^(base|[a-z0-9][a-z0-9_.]*-s[0-9]+(@[1-9][0-9]*)?)$")]


class MeterConfig(Section):
    """How much `vipo credit` measures, and of what. Samples are drawn as in training (`sampling`, `training`)."""

    arms: tuple[str, ...] = Field(
        ("grpo", "vipo", "contrast", "product", "inverted", "shuffled"),
        min_length=1,
        strict=False,
        description="Whose credit is compared; the first is what the others are compared with.",
    )
    checkpoints: tuple[Checkpoint, ...] = Field(
        ("base",),
        min_length=1,
        strict=False,
        description="Where the workflow measures: base, the generator as it is; grpo-s0, a run's final weights; "
        "grpo-s0@12, those of one of its training.save_at.",
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

    @field_validator("arms", "checkpoints", "directions")
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


def measurement_label(checkpoint: str) -> str:
    """Name of a checkpoint's folder below ``credit/``: ``base``, ``<run>``, or ``<run>-u<update>``."""
    return checkpoint.replace("@", "-u")


def measured_weights(checkpoint: str, experiment: Path) -> Path | None:
    """The folder of a checkpoint's weights; None: the generator as it is."""
    found = re.fullmatch(_CHECKPOINT, checkpoint)
    if found is None:
        return None
    run = experiment / "runs" / found["run"]
    return run / "weights" if found["update"] is None else run / "updates" / f"{int(found['update']):06d}"


def check_checkpoints(meter: MeterConfig, saved: Mapping[str, Collection[int]]) -> None:
    """Refuse checkpoints that no run of the experiment makes.

    Args:
        meter: the section.
        saved: the updates whose weights are kept beside the final ones, by trained run.

    Raises:
        ConfigError: naming the checkpoint, and what may be chosen.
    """
    for checkpoint in meter.checkpoints:
        found = re.fullmatch(_CHECKPOINT, checkpoint)
        if found is None:
            continue
        run, update = found["run"], found["update"]
        if run not in saved:
            raise ConfigError(
                f"experiment.meter.checkpoints: {checkpoint!r}: no run {run!r} is trained; one of {', '.join(saved)}"
            )
        if update is not None and int(update) not in saved[run]:
            kept = ", ".join(map(str, sorted(saved[run]))) or "none"
            raise ConfigError(
                f"experiment.meter.checkpoints: {checkpoint!r}: update {update} of it is not kept ({kept} are); add it "
                "to training.save_at"
            )
