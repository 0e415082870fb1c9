"""The validated configuration. Every number that decides a result is a field here.

Fields are frozen and unknown keys are refused. Values that need a model to be checked (component
count against feature width, grid sizes) are checked when a run is set up.
"""

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*\Z")
_ARM = re.compile(r"[a-z0-9][a-z0-9_]*(\.[0-9]+)?\Z")
# Of an experiment or arm: what is appended to it must still name a file.
_LONGEST_NAME = 100
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z")

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "flux": "vipo.generators.flux:FluxGenerator",
        "sd": "vipo.generators.stable_diffusion:StableDiffusionGenerator",
        "wan": "vipo.generators.wan:WanGenerator",
    }
)
"""Generator adapters by name: one line each; an import path needs none."""

REWARDS: Mapping[str, str] = MappingProxyType(
    {
        "redness": "vipo.rewards.redness:redness",
        "object_redness": "vipo.rewards.object_redness:object_redness",
        "scene": "vipo.rewards.scene:scene",
        "scene_shape": "vipo.rewards.scene:scene_shape",
        "scene_background": "vipo.rewards.scene:scene_background",
        "scene_count": "vipo.rewards.scene:scene_count",
    }
)
"""Import paths of the rewards that ship, by name: a mistyped name is found before anything heavy is imported."""

REPORTED = frozenset({"bootstrap", "confidence", "shown_prompts"})
"""What of section `evaluation` the report alone reads: it changes no sample and no score."""

SCENE_REWARDS = frozenset({"scene", "scene_shape", "scene_background", "scene_count"})
"""Rewards that compare a picture of 64 pixels a side with its prompt's metadata ``objects`` and ``background``."""

# No number is unbounded: what no machine would ever finish, or no format holds, is refused before anything starts.
LARGEST_INT = 2**31 - 1
MOST_SAMPLES = 2**16
"""Of an update: ``prompts_per_update * group_size``."""
MOST_EVALUATED = 10**6
"""Pictures that one set of weights is evaluated on: ``prompts * samples_per_prompt``."""
MOST_CALLS = 10**9
"""Evaluations of the network (of one sample at one step) of a run's training, or of an evaluation."""
MOST_PIXELS = 2**28
"""Of one sample, all frames together."""

DEVICE = r"^(cpu|cuda(:(0|[1-9][0-9]?))?)$"
"""Names of devices, as a pattern."""

PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def _at_home(value: str) -> str:
    if not value.startswith("~"):
        return value
    # Not Path.expanduser, which would also normalise what follows.
    expanded = os.path.expanduser(value)  # noqa: PTH111
    if expanded.startswith("~"):
        raise ValueError(f"{value!r}: there is no user {value[1:].partition('/')[0]!r}; './~' names a folder '~'")
    return expanded


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"{value!r} holds a NUL character, which no path can")
    if len(value.encode()) > 4000 or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError(f"{value[:40]!r}… is longer than a path can be (255 bytes a name, 4000 in all)")
    return _at_home(value)


UserPath = Annotated[str, AfterValidator(_path)]
"""A path, or what may stand in its place; `~` and `~user` expanded: what is saved means the same to everybody."""


def check_arm_name(name: str) -> str:
    """Give back the name of an arm, which folders and files are named by.

    Raises:
        ValueError: it is not lower-case letters, digits and underscores, with a decimal at most at its end.
    """
    if _ARM.match(name) and len(name) <= _LONGEST_NAME:
        return name
    raise ValueError(
        f"arm {name[:_LONGEST_NAME]!r} must be lower-case letters, digits and underscores, at most {_LONGEST_NAME}; a "
        "decimal may end it (sigma0.5)"
    )


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are immutable and never coerced from text."""

    # A tuple field lifts `strict` for itself alone: YAML and JSON have lists only.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _writable(cls, value: Any) -> Any:
        # Half a surrogate reads from YAML and JSON, and is found to be no text when the first file is written.
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and _SURROGATE.search(text):
                raise ValueError(f"{text[:_LONGEST_NAME]!r} holds half a surrogate, which no file can; leave it out")
        return value


class GeneratorConfig(Section):
    """Which generator is post-trained and how it is called."""

    family: str = Field(
        "flux", description="Generator adapter: 'flux', 'sd', 'wan', or an import path 'package.module:object'."
    )
    path: UserPath = Field(description="Folder in the diffusers pipeline layout, or a hub id.")
    revision: str | None = Field(
        None, description="Commit of the hub repository, all 40 digits, where `path` is a hub id."
    )
    height: Annotated[int, Field(ge=1, le=2**14)] = Field(description="Image height in pixels.")
    width: Annotated[int, Field(ge=1, le=2**14)] = Field(description="Image width in pixels.")
    frames: Annotated[int, Field(ge=1, le=2**14)] | None = Field(
        None, description="Frames of a video; null for pictures."
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=2**14)] = Field(
        512, description="Text tokens for the sequence encoder (T5 families)."
    )
    guidance_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        3.5,
        description="Embedded guidance of guidance-distilled models ('flux'), or classifier-free guidance ('sd', "
        "'wan'), off at 1 and below.",
    )
    negative_prompt: str = Field("", description="The prompt that classifier-free guidance leads away from.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast of the network in rollout, update and evaluation; weights stay fp32."
    )
    device: str = Field(
        "cpu",
        pattern=DEVICE,
        description="'cpu', 'cuda' or 'cuda:N' (N at most 99); a device that is absent is an error, never replaced.",
    )

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        return _registered(value, FAMILIES, "generator family")

    @field_validator("revision")
    @classmethod
    def _commit(cls, value: str | None) -> str | None:
        return _pinned(value)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if math.prod(self.sample_shape) > 3 * MOST_PIXELS:
            raise ValueError(
                f"a sample of {math.prod(self.sample_shape) // 3} pixels (height * width * frames) is more than the "
                f"{MOST_PIXELS} that fit; lower one of them"
            )
        return self

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one decoded sample: ``(3, height, width)``, or ``(frames, 3, height, width)`` of a video."""
        picture = (3, self.height, self.width)
        return picture if self.frames is None else (self.frames, *picture)


class PromptsConfig(Section):
    """Where prompts come from and how they are split."""

    source: UserPath = Field(
        description="txt, jsonl, csv or parquet file of at most 512 MiB, or an import path 'package.module:object'; "
        "relative paths start at the repository root."
    )
    text_key: str = Field("prompt", description="Column or key that holds the prompt (jsonl, csv, parquet).")
    eval_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="Share of prompts held out, decided by each prompt's own hash."
    )
    max_characters: PositiveInt = Field(2000, description="Longer prompts are dropped and counted.")
    ignore_case: bool = Field(
        False, description="Drop and count a prompt that differs from an earlier one in letter case alone."
    )


class RewardTerm(Section):
    """One reward of the weighted sum."""

    name: str = Field(description="A registered reward or an import path 'package.module:object'.")
    weight: float = Field(1.0, ge=-1e6, le=1e6, allow_inf_nan=False)

    @field_validator("name")
    @classmethod
    def _known_reward(cls, value: str) -> str:
        return _registered(value, REWARDS, "reward")


class RewardConfig(Section):
    """What is optimised: rewards are normalised within each group, weighted and added."""

    terms: tuple[RewardTerm, ...] = Field(min_length=1, strict=False)

    @field_validator("terms")
    @classmethod
    def _distinct(cls, value: tuple[RewardTerm, ...]) -> tuple[RewardTerm, ...]:
        names = [term.name for term in value]
        if len(set(names)) != len(names):
            raise ValueError(f"a reward is named twice: {', '.join(names)}")
        if all(term.weight == 0 for term in value):
            raise ValueError("every weight is 0; at least one reward must count")
        return value


class PerceptionConfig(Section):
    """The Perceptual Structuring Module: backbone, allocation map and its orientation."""

    backbone: str = Field(
        "efficientnet_lite0",
        description="'efficientnet_lite0' (packaged weights), any timm name, 'hf-hub:owner/name', or an import path.",
    )
    weights: UserPath | None = Field(
        None,
        description="Local weights (safetensors), or folder of a timm or transformers model; null: the package's or "
        "the hub's.",
    )
    revision: str | None = Field(
        None,
        description="Commit of the hub repository of the backbone's weights, all 40 digits; null: the one that timm "
        "names, or main (the file itself is recorded with its hash).",
    )
    layer: Annotated[int, Field(ge=-1000, le=1000)] | None = Field(
        None, description="Feature stage or block (negative counts from the end); null: the registry's."
    )
    input_size: Annotated[int, Field(ge=1, le=2**13)] | None = Field(
        None, description="Shorter side in pixels fed to the backbone; null: the registry's."
    )
    components: Annotated[int, Field(ge=1, le=8)] = Field(3, description="K, the number of principal directions.")
    aggregation: Literal["variance", "average", "first"] = Field(
        "variance",
        description="Of the K projections. variance: each scaled to [0, 1], weighted by its explained variance; "
        "average: the mean of the raw ones, scaled once; first: the first alone.",
    )
    smoothing: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(
        1.0, description="Gaussian sigma on the patch grid; 0 turns it off."
    )
    orientation: Literal["norm", "centre", "border", "skew", "inverted_sklearn", "none"] | None = Field(
        None, description="How the sign of each direction is fixed; null: the registry's rule for the backbone."
    )
    exponent: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = Field(
        1.0, description="M ** exponent on the min-max map: above 1 sharpens it, below 1 flattens it."
    )
    floor: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="floor + (1 - floor) M: the share of the advantage that the least important position keeps."
    )
    normalize: Literal["minmax", "mean"] = Field(
        "minmax",
        description="'minmax': the paper's [0, 1]; 'mean': divided by the map's mean, so the step size does not drift.",
    )
    temporal_smoothing: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(
        0.3, description="Clips: Gaussian sigma in latent frames; 0 turns it off. Pictures do not read it."
    )

    @field_validator("revision")
    @classmethod
    def _commit(cls, value: str | None) -> str | None:
        return _pinned(value)


class WindowConfig(Section):
    """Steps that draw noise and are trained; all others follow the ODE (MixGRPO, Flow-GRPO-Fast)."""

    size: PositiveInt = Field(description="Stochastic steps of an update, shared by all its samples.")
    move: Literal["fixed", "random", "slide"] = Field(
        "slide", description="Stays at `start`; drawn anew each update; or slides by `stride` every `every` updates."
    )
    start: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="First stochastic step (of a window that slides: at first)."
    )
    every: PositiveInt = Field(25, description="Updates between two moves of a window that slides.")
    stride: PositiveInt = Field(1, description="Steps of one move; after the last place it starts again.")


class SamplingConfig(Section):
    """The chain that produces training samples."""

    steps: Annotated[int, Field(ge=2, le=1000)] = Field(10, description="T, network evaluations per sample.")
    shift: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = Field(
        3.0, description="Time shift s of the sigma schedule: s x / (1 + (s - 1) x); flow matching only."
    )
    transition: Literal["dance", "flow", "cps", "ddim"] = Field(
        "dance",
        description="dance: constant-g reverse SDE (DanceGRPO, ViPO); flow: Flow-GRPO's; cps: coefficients-preserving; "
        "ddim: for noise-predicting UNets.",
    )
    eta: Annotated[float, Field(ge=1e-4, le=100, allow_inf_nan=False)] = Field(
        0.3, description="Noise scale: g (dance), a (flow), eta (cps, ddim: at most 1)."
    )
    same_initial_noise: bool = Field(True, description="One initial noise for all samples of a group.")
    window: WindowConfig | None = Field(None, description="null: every step but the last is stochastic.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.transition in ("cps", "ddim") and self.eta > 1:
            raise ValueError(f"eta {self.eta} exceeds 1, the most that transition {self.transition!r} takes")
        if self.window is not None:
            start = 0 if self.window.move == "random" else self.window.start
            if start + self.window.size > self.steps - 1:
                raise ValueError(
                    f"window: start {start} + size {self.window.size} exceeds the {self.steps - 1} steps "
                    f"with a density of steps {self.steps} (the last step is deterministic)"
                )
        return self


class ClipConfig(Section):
    """The trust region. `range` is on the ratio that the gate looks at (see `scope`)."""

    side: Literal["ppo", "symmetric", "none"] = Field(
        "ppo", description="ppo: one-sided min(); symmetric: no gradient outside the range on either side; none: off."
    )
    scope: Literal["sample", "position"] = Field(
        "sample", description="Whether the sample's ratio (mean log-probability) or each position's own decides."
    )
    range: PositiveFloat = Field(
        1e-4,
        description="Half-width of the accepted range of that ratio around 1. Its scale depends on `scope` and "
        "`channels`: compare it with the metrics log_ratio/rms_sample and log_ratio/rms_position.",
    )


class ObjectiveConfig(Section):
    """How advantages are formed, spread over positions and turned into a loss."""

    ratio: Literal["sample", "position"] = Field(
        "position", description="Scalar ratio (GRPO) or one per position (ViPO)."
    )
    channels: Literal["mean", "sum"] = Field(
        "mean", description="How a position's log-probability reduces its channels; the ratio's scale follows."
    )
    density: Literal["gaussian", "squared_error"] = Field(
        "gaussian", description="The transition's log-density, or Flow-CPS's published -(x' - mean)^2 in its place."
    )
    ratio_norm: Literal["none", "guard"] = Field(
        "none", description="guard: ratio normalisation and step weights of GRPO-Guard (dance or flow)."
    )
    map: Literal["none", "psm", "uniform", "inverted", "mean", "group", "shuffled", "oracle"] = Field(
        "psm",
        description="none: scalar advantage; psm: the allocation map; uniform: all ones; inverted: 1 - map; mean: the "
        "sample's own mean everywhere; group: the map averaged over the group; shuffled: the map's values elsewhere; "
        "oracle: the object's own pixels (drawn scenes only).",
    )
    map_on: Literal["advantage", "reward"] = Field(
        "advantage", description="What the map multiplies: the advantage, or the reward before the group statistics."
    )
    clip: ClipConfig = ClipConfig()
    kl_weight: NonNegativeFloat = Field(0.0, description="Weight of the KL divergence to the generator as it was.")
    advantage_clip: PositiveFloat = 5.0
    std: Literal["group", "batch"] = Field(
        "group", description="Standard deviation of the group (ddof 1) or of the whole update (ddof 0, Flow-GRPO)."
    )
    std_floor: PositiveFloat = Field(1e-4, description="Added to the standard deviation.")

    @property
    def reads_backbone(self) -> bool:
        """Whether the arm's map is made from the perception backbone's."""
        return self.map not in ("none", "uniform", "oracle")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ratio == "sample" and self.map != "none":
            raise ValueError(
                f"ratio 'sample' cannot carry map '{self.map}': the layout would not reach the gradient; "
                "use ratio 'position'"
            )
        if self.ratio == "position" and self.map == "none":
            raise ValueError("ratio 'position' needs a map: 'psm', or a control such as 'uniform' or 'inverted'")
        if self.ratio == "sample" and self.clip.scope == "position":
            raise ValueError("clip.scope 'position' needs ratio 'position'")
        if self.map == "none" and self.map_on == "reward":
            raise ValueError("map_on 'reward' needs a map, such as 'psm'")
        if self.ratio_norm == "guard" and self.density != "gaussian":
            raise ValueError("ratio_norm 'guard' needs density 'gaussian': it takes out that density's bias")
        return self


class OptimizerConfig(Section):
    """AdamW on fp32 weights."""

    learning_rate: PositiveFloat = 1e-5
    weight_decay: NonNegativeFloat = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), strict=False
    )
    max_grad_norm: PositiveFloat = 1.0


class LoraConfig(Section):
    """Low-rank adaptation (peft) instead of full fine-tuning."""

    rank: Annotated[int, Field(ge=1, le=2**13)] = 16
    alpha: PositiveFloat = 16.0
    targets: tuple[str, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1, strict=False)


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
    transition_choice: Literal["per_sample", "shared", "first"] = Field(
        "per_sample", description="Drawn for each sample, drawn once per update, or the first ones."
    )
    micro_batch: PositiveInt = Field(
        4, description="Samples in one network call, in the rollout and in the update alike."
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
        "ddp", description="The network whole in every process, or its weights, gradients and AdamW state in shards."
    )
    processes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Processes on each node, one a GPU.")
    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    timeout_seconds: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = Field(
        1800, description="How long the processes wait for one that is missing."
    )

    @property
    def world_size(self) -> int:
        """All processes of all nodes."""
        return self.processes * self.nodes


# Handed to a scheduler's command line.
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,@+-]*$", max_length=_LONGEST_NAME)]


class StageResources(Section):
    """What one job of a stage asks a cluster for, on each of its nodes."""

    partition: _Word | None = Field(None, description="null: the cluster's default.")
    qos: _Word | None = Field(None, description="Quality of service; null: the cluster's default.")
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = Field(
        None,
        description="null: on a generator.device 'cuda' one, for train distribution.processes; else none.",
    )
    cpus: PositiveInt | None = Field(
        None, description="null: training.threads, for train times distribution.processes."
    )
    memory_mb: PositiveInt = Field(8000, description="Main memory in MB.")
    runtime_minutes: PositiveInt = Field(60, description="Time limit; training goes on in the next job.")


class ClusterConfig(Section):
    """What the jobs of `snakemake --profile slurm` ask for; outside every identity, so a change reruns nothing."""

    account: _Word | None = Field(None, description="Charged for all jobs; null: none is named (no accounting).")
    stop_seconds: Annotated[int, Field(ge=0, le=65535)] = Field(
        300,
        description="How long before its time limit a training job is told to write a checkpoint and stop: more than "
        "an update takes. Slurm may do so a minute earlier. 0: not at all.",
    )
    prepare: StageResources = StageResources()
    encode: StageResources = StageResources()
    train: StageResources = StageResources()
    evaluate: StageResources = StageResources()
    report: StageResources = StageResources()
    crate: StageResources = StageResources()

    @model_validator(mode="after")
    def _trains_before_it_stops(self) -> Self:
        # Slurm checks limits now and then: the signal may come a minute earlier.
        if self.stop_seconds + 60 >= 60 * self.train.runtime_minutes and self.stop_seconds:
            raise ValueError(
                f"stop_seconds {self.stop_seconds} and the minute that Slurm may be early leave nothing of "
                f"train.runtime_minutes {self.train.runtime_minutes}: lower the one or raise the other"
            )
        return self


class EvaluationConfig(Section):
    """Held-out comparison: the same prompts and noise for every arm."""

    prompts: Annotated[int, Field(ge=2, le=MOST_EVALUATED)] = Field(
        40, description="Held-out prompts used (all, where fewer exist); intervals need two."
    )
    samples_per_prompt: PositiveInt = 2
    steps: Annotated[int, Field(ge=1, le=1000)] = Field(20, description="ODE steps.")
    batch: PositiveInt = 16
    rewards: tuple[str, ...] = Field(
        (), strict=False, description="Rewards that are reported; those that are trained are added by themselves."
    )
    seed: Seed = 1234
    bootstrap: Annotated[int, Field(ge=100, le=10**5)] = 2000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    shown_prompts: PositiveInt = Field(6, description="Prompts shown side by side in the report.")

    @field_validator("rewards")
    @classmethod
    def _known_rewards(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"a reward is named twice: {', '.join(value)}")
        return tuple(_registered(name, REWARDS, "reward") for name in value)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        samples = self.prompts * self.samples_per_prompt
        if samples > MOST_EVALUATED:
            raise ValueError(
                f"prompts {self.prompts} * samples_per_prompt {self.samples_per_prompt} is {samples} samples, more "
                f"than the {MOST_EVALUATED} that are held; lower one of them"
            )
        return self


class ArmConfig(Section):
    """One arm of an experiment."""

    base: Annotated[str, AfterValidator(check_arm_name)] | None = Field(
        None, description="File of configs/arm that the arm starts from; null: its own name's."
    )
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, strict=False)
    overrides: tuple[str, ...] = Field((), strict=False, description="Hydra overrides that hold for this arm alone.")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"a seed is named twice: {list(value)}")
        return value


class StudyConfig(Section):
    """What a study decides, fixed before it runs: which candidate may replace the reference, by one metric."""

    metric: str = Field(description="Score column that decides, such as reward/object_redness.")
    matched_on: str = Field(description="Score column that is held equal for it, such as change/total.")
    reference: str = Field(description="The arm that candidates are compared with.")
    candidates: tuple[str, ...] = Field(min_length=1, strict=False)
    choose_seeds: tuple[Seed, ...] = Field(min_length=2, strict=False, description="Seeds that choose the candidate.")
    confirm_seeds: tuple[Seed, ...] = Field(min_length=2, strict=False, description="Fresh seeds that confirm it.")

    @model_validator(mode="after")
    def _fresh(self) -> Self:
        if shared := set(self.choose_seeds) & set(self.confirm_seeds):
            raise ValueError(f"confirm_seeds must be fresh: {sorted(shared)} also chose")
        return self


class ExperimentConfig(Section):
    """The unit of science: arms x seeds on one generator, prompt set and reward."""

    name: str
    title: str
    question: str = Field(description="What the experiment asks, in a sentence for the report.")
    arms: dict[str, ArmConfig] = Field(min_length=1)
    study: StudyConfig | None = Field(None, description="The decision that the experiment was run for, if any.")

    @model_validator(mode="after")
    def _study_has_its_runs(self) -> Self:
        if self.study is not None:
            seeds = {*self.study.choose_seeds, *self.study.confirm_seeds}
            for name in (self.study.reference, *self.study.candidates):
                absent = seeds - set(self.arms[name].seeds if name in self.arms else ())
                if absent:
                    raise ValueError(f"study: arm {name!r} lacks the seeds {sorted(absent)}")
        return self

    @field_validator("arms")
    @classmethod
    def _with_base(cls, value: dict[str, ArmConfig]) -> dict[str, ArmConfig]:
        if "base" not in value:
            raise ValueError(f"{list(value)} lacks 'base', the generator as it is, which every arm is compared with")
        for name in value:
            check_arm_name(name)
        return value

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        if not _NAME.match(value) or len(value) > _LONGEST_NAME:
            raise ValueError(
                f"{value[:_LONGEST_NAME]!r} must be lower-case letters, digits and underscores, at most "
                f"{_LONGEST_NAME}: it names a folder"
            )
        return value


_Size = Annotated[int, Field(ge=1, le=2**12)]


class PretrainConfig(Section):
    """The demo generator's construction: scenes, autoencoder, transformer and training (`vipo base`)."""

    seed: Seed = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    scenes: Annotated[int, Field(ge=1, le=10**6)] = 32000
    two_objects: Annotated[float, Field(ge=0, le=1)] = 0.15
    max_sequence_length: _Size = 16
    autoencoder_width: _Size = 32
    latent_channels: _Size = 8
    latent_noise: NonNegativeFloat = 0.05
    autoencoder_steps: PositiveInt = 6000
    autoencoder_batch_size: PositiveInt = 16
    autoencoder_learning_rate: PositiveFloat = 3e-3
    text_width: Annotated[int, Field(ge=32, le=2**12, multiple_of=32)] = 96
    double_blocks: _Size = 2
    single_blocks: _Size = 3
    heads: _Size = 3
    head_width: Annotated[int, Field(ge=16, le=2**12, multiple_of=16)] = 64
    steps: PositiveInt = 9000
    batch_size: PositiveInt = 48
    learning_rate: PositiveFloat = 1.5e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup: Annotated[int, Field(ge=0, le=LARGEST_INT)] = 300
    average_decay: Annotated[float, Field(gt=0, lt=1)] = 0.9995
    shift: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 2.0
    sampling_shift: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 2.0

    @model_validator(mode="after")
    def _ends(self) -> Self:
        for steps, size in (("steps", "batch_size"), ("autoencoder_steps", "autoencoder_batch_size")):
            count = getattr(self, steps) * getattr(self, size)
            if count > MOST_CALLS:
                raise ValueError(
                    f"{steps} {getattr(self, steps)} * {size} {getattr(self, size)} is {count} samples, more than the "
                    f"{MOST_CALLS} that end in reasonable time; lower one of them"
                )
        return self


class Config(Section):
    """Everything one run needs, composed from `configs/` and the overrides."""

    experiment: ExperimentConfig
    arm: Annotated[str, AfterValidator(check_arm_name)]
    seed: Seed = 0
    generator: GeneratorConfig
    prompts: PromptsConfig
    reward: RewardConfig
    perception: PerceptionConfig
    sampling: SamplingConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    distribution: DistributionConfig = DistributionConfig()
    evaluation: EvaluationConfig
    cluster: ClusterConfig = ClusterConfig()
    pretrain: PretrainConfig | None = Field(None, description="How the generator was built, where it was built here.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        window = self.sampling.window
        dense = self.sampling.steps - 1 if window is None else window.size
        if self.training.trained_transitions > dense:
            raise ValueError(
                f"training.trained_transitions {self.training.trained_transitions} exceeds the {dense} transitions "
                f"with a density of sampling.steps {self.sampling.steps} (the last step is deterministic"
                f"{'' if window is None else ', and so is all outside sampling.window'})"
            )
        if self.objective.ratio_norm == "guard" and self.sampling.transition not in ("dance", "flow"):
            raise ValueError(
                "objective.ratio_norm 'guard' weights steps by 1 / dt, which fits the transitions dance and flow alone"
            )
        study = self.experiment.study
        if study is not None:
            changes = {f"change/{part}" for part in ("total", "foreground", "background")}
            known = {f"reward/{name}" for name in self.evaluation.rewards} | changes
            for key, value in (("metric", study.metric), ("matched_on", study.matched_on)):
                if value not in known:
                    raise ValueError(
                        f"experiment.study.{key} {value!r} is not measured; one of {', '.join(sorted(known))}"
                    )
        for key in ("height", "width"):
            if getattr(self.generator, key) % 2:
                raise ValueError(f"generator.{key} {getattr(self.generator, key)} must be even")
        return self

    @field_validator("evaluation")
    @classmethod
    def _with_trained_rewards(cls, value: EvaluationConfig, info: ValidationInfo) -> EvaluationConfig:
        # Arms are compared on what they were trained for. Without `reward`, which did not validate, nothing is known.
        reward = info.data.get("reward")
        names = () if reward is None else (term.name for term in reward.terms)
        added = tuple(name for name in names if name not in value.rewards)
        return value.model_copy(update={"rewards": value.rewards + added}) if added else value

    @model_validator(mode="after")
    def _ends(self) -> Self:
        training, evaluation = self.training, self.evaluation
        weights = 1 + len(training.save_at)
        for what, count in (
            (
                "training.updates * prompts_per_update * group_size * sampling.steps",
                training.updates * training.prompts_per_update * training.group_size * self.sampling.steps,
            ),
            (
                f"evaluation.prompts * samples_per_prompt * steps, for {weights} sets of weights,",
                evaluation.prompts * evaluation.samples_per_prompt * evaluation.steps * weights,
            ),
        ):
            if count > MOST_CALLS:
                raise ValueError(
                    f"{what} is {count} evaluations of the network, more than the {MOST_CALLS} that end in reasonable "
                    "time; lower one of them"
                )
        return self

    @property
    def run_name(self) -> str:
        """Folder name of the run: ``<arm>-s<seed>``."""
        return f"{self.arm}-s{self.seed}"

    @property
    def is_base(self) -> bool:
        """Whether this arm is the untrained generator."""
        return self.arm == "base"

    def training_identity(self) -> dict[str, Any]:
        """The sections that decide a training run's result; a checkpoint belongs to exactly one such value.

        Checkpoint frequency and how many are kept change nothing in the result and are left out, and so are the
        processes: a run goes on with another number of them.
        """
        data = self.model_dump(mode="json", exclude={"experiment", "distribution", "evaluation", "cluster", "pretrain"})
        for volatile in ("checkpoint_every", "keep_checkpoints"):
            del data["training"][volatile]
        return data

    def prompts_identity(self) -> dict[str, Any]:
        """What decides the prepared prompts."""
        return self.prompts.model_dump(mode="json")

    def embeddings_identity(self) -> dict[str, Any]:
        """What decides the embeddings, beside the prompts."""
        generator = self.generator.model_dump(
            mode="json", include={"family", "path", "revision", "device", "max_sequence_length", "negative_prompt"}
        )
        return {**generator, "threads": self.training.threads}

    def evaluation_identity(self) -> dict[str, Any]:
        """What decides an evaluation's samples and scores, beside the trained weights."""
        kept = {} if self.is_base else self.training.model_dump(mode="json", include={"updates", "save_at"})
        return {
            "generator": self.generator.model_dump(mode="json"),
            "perception": self.perception.model_dump(mode="json"),
            "evaluation": self.evaluation.model_dump(mode="json", exclude=set(REPORTED)),
            "shift": self.sampling.shift,
            "threads": self.training.threads,
            "kept": kept,
        }

    def report_identity(self) -> dict[str, Any]:
        """What the report reads beside the results."""
        return self.model_dump(mode="json", include={"experiment", "reward", "evaluation"})


def config_hash(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs of a dotted key (``section.key``) and its value."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flattened(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def divisors(number: int) -> str:
    """The divisors of a number from 1 to `MOST_SAMPLES`, as text."""
    return ", ".join(str(item) for item in range(1, number + 1) if number % item == 0)


def _pinned(revision: str | None) -> str | None:
    if revision is None or _COMMIT.match(revision):
        return revision
    raise ValueError(
        f"{revision!r} is no whole commit hash; a branch, a tag or a part of a hash may come to mean other weights. "
        "huggingface_hub.HfApi().model_info('OWNER/NAME').sha is the newest one's 40 hexadecimal digits"
    )


def _registered(value: str, known: Iterable[str], what: str) -> str:
    if value in known or _IMPORT_PATH.match(value):
        return value
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"{value!r} is not a {what}: {hint}choose one of {', '.join(known)}, or an import path 'package.module:object'"
    )
