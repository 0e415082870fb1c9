"""Section `objective`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from vipo.config.section import NonNegativeFloat, PositiveFloat, Section


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
