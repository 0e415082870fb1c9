"""Sections `training` and `distribution`."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from vipo.config.section import LARGEST_INT, MOST_SAMPLES, PositiveFloat, PositiveInt, Section
from vipo.config.values import divisors

EMA = "ema"
"""What the mean of the trained weights is called: as a kept policy, and its folder below that of the trained ones."""


class LoraConfig(Section):
    """Low-rank adaptation (peft) instead of full fine-tuning."""

    rank: Annotated[int, Field(ge=1, le=2**13)] = 16
    alpha: PositiveFloat = 16.0
    targets: tuple[str, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1, strict=False)
    init: Literal["uniform", "gaussian"] = Field(
        "uniform",
        description="Of its A matrices, B is 0: as PyTorch draws a layer (peft's own choice), or normal with standard "
        "deviation 1 / rank (Flow-GRPO).",
    )


class TrainingConfig(Section):
    """The update: how many samples, which transitions, how many optimizer steps."""

    updates: PositiveInt = 300
    prompts_per_update: PositiveInt = 8
    group_size: Annotated[int, Field(ge=2, le=LARGEST_INT)] = Field(
        12, description="G, samples per prompt; a group of 1 has no statistics."
    )
    optimizer_steps_per_update: PositiveInt = 3
    epochs: PositiveInt = Field(1, description="Passes over the samples of an update.")
    trained_transitions: PositiveInt = Field(
        4, description="Transitions trained per sample, of the T - 1 that have a density."
    )
    best_of: PositiveInt | None = Field(
        None, description="Learn from this many samples of each group, half the best and half the worst; null: all."
    )
    transition_choice: Literal["per_sample", "stratified", "shared", "first"] = Field(
        "per_sample",
        description="Drawn for each sample; for each sample one of each of equal pieces of the chain; drawn once per "
        "update; or the first ones.",
    )
    micro_batch: PositiveInt = Field(
        4, description="Samples in one network call of the update, and of the rollout unless rollout_batch differs."
    )
    joined_transitions: PositiveInt = Field(
        1,
        description="Trained transitions of a micro-batch in one network call of the update; divides "
        "trained_transitions. Above 1 log_ratio_tolerance judges what this device makes of it, as of rollout_batch.",
    )
    rollout_batch: PositiveInt | None = Field(
        None,
        description="Samples in one network call of the rollout, a multiple of micro_batch; null: micro_batch. The "
        "ratio is then no longer 1 by construction: log_ratio_tolerance judges what this device makes of it.",
    )
    decode_batch: PositiveInt | None = Field(
        None, description="Samples decoded at a time; null: micro_batch. The ratio does not depend on it."
    )
    reward_batch: PositiveInt | None = Field(
        None, description="Samples that a reward is given at a time; null: micro_batch. As decode_batch."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass instead of keeping them."
    )
    checkpoint_every: PositiveInt = Field(10, description="Updates between checkpoints.")
    keep_checkpoints: PositiveInt = 2
    log_ratio_tolerance: PositiveFloat = Field(
        1e-5,
        description="Largest |log rho| of a position allowed before an update's first step. Rounding in the mean "
        "counts over the transition's std, and by `channels`: docs/method.md, 'On-policy check'.",
    )
    lora: LoraConfig | None = Field(None, description="null: full fine-tuning.")
    base_distance: bool = Field(
        False,
        description="Whether every update logs alarm/base_distance, the mean squared difference of the policy's "
        "predictions to the base's: a network call more for each trained transition and, without LoRA, a copy of the "
        "network beside it. No weight depends on it.",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Keep a mean of the trained weights too, in fp32, which is this share of itself after each update "
        "(less in the first ones); evaluation.weights chooses it.",
    )
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="CPU threads of a process; part of the result's identity."
    )
    save_at: tuple[PositiveInt, ...] = Field(
        (),
        strict=False,
        description="Updates whose weights are kept for evaluation beside the final ones; those that a run with fewer "
        "`updates` does not reach are left out.",
    )

    @field_validator("save_at")
    @classmethod
    def _reached(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        # Without `updates`, which did not validate, there is no run to leave anything out of.
        return tuple(update for update in value if update < info.data.get("updates", update))

    @model_validator(mode="after")
    def _divides(self) -> Self:
        samples = self.prompts_per_update * self.group_size
        if samples > MOST_SAMPLES:
            raise ValueError(
                f"prompts_per_update {self.prompts_per_update} * group_size {self.group_size} is {samples} samples an "
                f"update, more than the {MOST_SAMPLES} that are held; lower one of them"
            )
        steps = self.optimizer_steps_per_update
        if self.group_size % steps:
            raise ValueError(
                f"group_size {self.group_size} is not a multiple of optimizer_steps_per_update {steps}: every "
                "optimizer step takes the same share of every group; optimizer_steps_per_update may be "
                f"{divisors(self.group_size)}"
            )
        if self.best_of is not None and (self.best_of % (2 * steps) or self.best_of > self.group_size):
            raise ValueError(
                f"best_of {self.best_of} must be at most group_size {self.group_size} and a multiple of {2 * steps} "
                "(2 x optimizer_steps_per_update): every optimizer step takes as many of the best as of the worst"
            )
        for name, per_step in self.samples_per_step().items():
            if per_step % self.micro_batch:
                raise ValueError(
                    f"micro_batch {self.micro_batch} does not divide the {per_step} samples of an optimizer step "
                    f"(prompts_per_update * {name} / optimizer_steps_per_update); micro_batch may be "
                    f"{divisors(math.gcd(*self.samples_per_step().values()))}"
                )
        if self.trained_transitions % self.joined_transitions:
            raise ValueError(
                f"joined_transitions {self.joined_transitions} does not divide trained_transitions "
                f"{self.trained_transitions}; it may be {divisors(self.trained_transitions)}"
            )
        if self.rollout_batch is not None and self.rollout_batch % self.micro_batch:
            raise ValueError(f"rollout_batch {self.rollout_batch} is not a multiple of micro_batch {self.micro_batch}")
        return self

    def samples_per_step(self) -> dict[str, int]:
        """Samples of an optimizer step, by the field that decides it: drawn, and with `best_of` learned from."""
        counts = {"group_size": self.group_size} | ({} if self.best_of is None else {"best_of": self.best_of})
        return {
            name: self.prompts_per_update * count // self.optimizer_steps_per_update for name, count in counts.items()
        }


class DistributionConfig(Section):
    """The processes that train one run together: how fast it is, and of its result no more than the order of sums."""

    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="The network whole in every process, or its weights, gradients and optimizer state in shards.",
    )
    offload: bool = Field(
        False,
        description="Under fsdp: weights, gradients and optimizer state lie in main memory; on the device are those of "
        "the block that computes, and of the next one. One process may do so alone.",
    )
    processes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Processes on each node, one a GPU.")
    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    timeout_seconds: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = Field(
        1800, description="How long the processes wait for one that is missing."
    )

    @model_validator(mode="after")
    def _offloads(self) -> Self:
        if self.offload and self.strategy != "fsdp":
            raise ValueError(f"offload true needs strategy fsdp, not {self.strategy!r}: PyTorch's FSDP2 does it")
        return self

    @property
    def world_size(self) -> int:
        """All processes of all nodes."""
        return self.processes * self.nodes

    @property
    def shards(self) -> bool:
        """Whether the network is held in shards, if only in one."""
        return self.strategy == "fsdp" and (self.world_size > 1 or self.offload)
