"""Section `objective`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vipo.config.forward import AwmConfig, NftConfig
from vipo.config.parts import ImportedPart, by_name
from vipo.config.registries import GATES, OBJECTIVES
from vipo.config.section import NonNegativeFloat, PositiveFloat, Section


class RatioGateConfig(Section):
    """A gate that looks at the ratio alone."""

    scope: Literal["sample", "position"] = Field(
        "sample", description="Whether the sample's ratio (mean log-probability) or each position's own decides."
    )
    range: PositiveFloat = Field(
        1e-4,
        description="Half-width of the accepted range of that ratio around 1. Its scale depends on `scope` and "
        "`channels`: compare it with the metrics log_ratio/rms_sample and log_ratio/rms_position.",
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest ratio that are accepted."""
        return 1 - self.range, 1 + self.range


class PpoGateConfig(RatioGateConfig):
    """One-sided: no gradient where the ratio is beyond the range in the advantage's direction."""

    name: Literal["ppo"] = "ppo"
    range_above: PositiveFloat | None = Field(
        None, description="Of ratios above 1, where it is another one (DAPO's clip-higher); null: `range`."
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest ratio that are accepted."""
        return 1 - self.range, 1 + (self.range if self.range_above is None else self.range_above)


class SymmetricGateConfig(RatioGateConfig):
    """No gradient outside the range, on either side."""

    name: Literal["symmetric"]


class DivergenceGateConfig(Section):
    """No gradient where the policy is far from the one that sampled and would go further (Flow-DPPO)."""

    name: Literal["divergence"]
    scope: Literal["sample", "position"] = Field(
        "sample", description="Whether the transition's divergence (as published) or each position's own decides."
    )
    bound: PositiveFloat = Field(
        1e-5, description="Largest divergence, a mean over elements, that is near: 1e-5 (UniRL), 1e-6 (Flow-Factory)."
    )


class NoGateConfig(Section):
    """No trust region."""

    name: Literal["none"]


class ImportedGateConfig(ImportedPart):
    """A gate by import path, with its own options."""

    known, kind = GATES, "gate"


GateConfig = Annotated[
    PpoGateConfig | SymmetricGateConfig | DivergenceGateConfig | NoGateConfig | ImportedGateConfig,
    by_name(PpoGateConfig, SymmetricGateConfig, DivergenceGateConfig, NoGateConfig, ImportedGateConfig),
]


class SurrogateConfig(Section):
    """The surrogate of policy gradients, with ratios per sample (GRPO) or per position (ViPO)."""

    name: Literal["surrogate"] = "surrogate"
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
    gate: GateConfig = Field(PpoGateConfig(), description="The trust region.")
    kl_weight: NonNegativeFloat = Field(0.0, description="Weight of the KL divergence to the generator as it was.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ratio == "sample" and getattr(self.gate, "scope", None) == "position":
            raise ValueError("gate.scope 'position' needs ratio 'position'")
        if self.ratio_norm == "guard" and self.density != "gaussian":
            raise ValueError("ratio_norm 'guard' needs density 'gaussian': it takes out that density's bias")
        return self


class ImportedObjectiveConfig(ImportedPart):
    """An objective by import path, with its own options."""

    known, kind = OBJECTIVES, "objective"


ObjectiveConfig = Annotated[
    SurrogateConfig | NftConfig | AwmConfig | ImportedObjectiveConfig,
    by_name(SurrogateConfig, NftConfig, AwmConfig, ImportedObjectiveConfig),
]
