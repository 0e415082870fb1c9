"""Section `credit`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vipo.config.parts import ImportedPart, by_name
from vipo.config.registries import CREDIT_SOURCES
from vipo.config.section import Section


class BackboneCreditConfig(Section):
    """The allocation map of the perception backbone (ViPO); its options are section `perception`."""

    name: Literal["backbone"]


class UniformCreditConfig(Section):
    """Ones everywhere."""

    name: Literal["uniform"]


class OracleCreditConfig(Section):
    """The object's own pixels, on drawn scenes; the options mean what those of section `perception` do."""

    name: Literal["oracle"]
    exponent: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    normalize: Literal["minmax", "mean"] = "minmax"


class ContrastCreditConfig(Section):
    """Where a sample differs from the other samples of its prompt; reads no backbone but for features."""

    name: Literal["contrast"]
    of: Literal["latents", "features"] = Field(
        "latents", description="What is compared: clean latents, or the backbone's features (section perception)."
    )
    scope: Literal["sample", "group"] = Field("sample", description="A map for each sample, or one for its group.")
    exponent: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    normalize: Literal["minmax", "mean"] = "mean"


class RewardCreditConfig(Section):
    """Where a reward looks: by its gradient, or by the map of where that it returns beside its scores."""

    name: Literal["reward"]
    reads: Literal["gradient", "occlusion", "where"] = Field(
        "gradient",
        description="gradient: the size of the reward's gradient by the latents at a position; occlusion: by how much "
        "the reward changes where a patch is blurred, for rewards without gradient; where: what the reward itself "
        "says, such as the boxes of the words that were read.",
    )
    patches: int = Field(8, ge=2, le=64, description="Of occlusion, a side: patches^2 more scores of each sample.")
    term: str | None = Field(None, description="Which of reward.terms; null: the only one.")
    exponent: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    normalize: Literal["minmax", "mean"] = "mean"


class AttentionCreditConfig(Section):
    """Where the generator's own picture attends to the prompt's words, for each transition; no call of its own."""

    name: Literal["attention"]
    layers: int = Field(4, ge=1, le=1000, description="How many, evenly spaced over the middle half of them.")
    exponent: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    normalize: Literal["minmax", "mean"] = Field("mean", description="Of each transition's map by itself.")


class ImportedCreditConfig(ImportedPart):
    """A credit source by import path, with its own options."""

    known, kind = CREDIT_SOURCES, "credit source"


CreditSourceConfig = Annotated[
    BackboneCreditConfig
    | UniformCreditConfig
    | OracleCreditConfig
    | ContrastCreditConfig
    | RewardCreditConfig
    | AttentionCreditConfig
    | ImportedCreditConfig,
    by_name(
        BackboneCreditConfig,
        UniformCreditConfig,
        OracleCreditConfig,
        ContrastCreditConfig,
        RewardCreditConfig,
        AttentionCreditConfig,
        ImportedCreditConfig,
    ),
]

Control = Literal["none", "inverted", "shuffled", "mean", "group"]


class CreditConfig(Section):
    """Where in a sample its advantage goes."""

    sources: tuple[CreditSourceConfig, ...] = Field(
        (BackboneCreditConfig(name="backbone"),),
        strict=False,
        description="Their weights are multiplied; []: nowhere in particular, the advantage is a scalar (GRPO).",
    )
    mixture: tuple[Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)], ...] | None = Field(
        None,
        strict=False,
        description="A share of each source, such as [0.7, 0.3]: their weights are added by these, not multiplied.",
    )
    control: Control = Field(
        "none",
        description="Around the product or mixture. inverted: turned upside down; shuffled: the same weights "
        "elsewhere; mean: the sample's own mean everywhere; group: averaged over the group.",
    )
    multiplies: Literal["advantage", "reward"] = Field(
        "advantage",
        description="What the weights are multiplied into: the advantage, or the reward before the group statistics.",
    )
    steps: Literal["none", "tweedie", "ode"] = Field(
        "none",
        description="Whose gain an advantage is. none: the sample's; else each transition's own, signed, by the reward "
        "of x0 as estimated before and after it. tweedie: its mean, by the prediction that was sampled with; ode: the "
        "end of the deterministic chain from there.",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return tuple(source.name for source in self.sources)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the sources, no two alike: one whose name stood before has its number behind it, ``contrast 2``."""
        counts = [self.names[: place + 1].count(name) for place, name in enumerate(self.names)]
        return tuple(name if count == 1 else f"{name} {count}" for name, count in zip(self.names, counts, strict=True))

    @property
    def is_control(self) -> bool:
        """Whether the weights tell what others are worth: under a control, of ones, or of the truth."""
        return self.control != "none" or set(self.names) <= {"uniform", "oracle"}

    @property
    def reads_backbone(self) -> bool:
        """Whether the perception backbone is a source, or a source compares its features."""
        return any(
            isinstance(source, BackboneCreditConfig)
            or (isinstance(source, ContrastCreditConfig) and source.of == "features")
            for source in self.sources
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(source in self.sources[:place] for place, source in enumerate(self.sources)):
            raise ValueError(
                f"a source is named twice with the same options: {', '.join(self.names)}; leave one out, or give it "
                "other options"
            )
        if self.mixture is not None and len(self.mixture) != len(self.sources):
            raise ValueError(
                f"mixture has {len(self.mixture)} shares of {len(self.sources)} sources; give one of each, or null for "
                "their product"
            )
        if self.steps != "none" and self.multiplies == "reward":
            raise ValueError(
                f"steps {self.steps!r} gives transitions advantages of their own, and multiplies 'reward' leaves none "
                "to give; use multiplies=advantage"
            )
        if not self.sources:
            for key, default in (("control", "none"), ("multiplies", "advantage")):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} {getattr(self, key)!r} needs one of sources, such as {{name: backbone}}")
        return self
