"""Sections of the objectives that compare policies on the forward process, and of the policies that they keep."""

from typing import Annotated, Literal

from pydantic import Field

from vipo.config.section import LARGEST_INT, NonNegativeFloat, PositiveFloat, Section

Share = Annotated[float, Field(ge=0, le=1)]


class DecayConfig(Section):
    """How slowly a kept policy follows the trained one: after each update ``kept <- d kept + (1 - d) trained``."""

    flat: Annotated[int, Field(ge=0, le=LARGEST_INT)] = Field(0, description="Optimizer steps up to which d is 0.")
    rate: Share = Field(0.001, description="By how much d then rises with each optimizer step.")
    hold: Share = Field(0.5, description="The largest d; 0: the kept policy is the trained one before the update.")


class NftConfig(Section):
    """DiffusionNFT: the samples of a slow old policy, each position as good or bad as its advantage says."""

    name: Literal["nft"]
    form: Literal["paper", "code"] = Field(
        "code",
        description="paper: squared error of the velocity; code: of x0, divided by its mean absolute error, times z "
        "over beta.",
    )
    beta: PositiveFloat = Field(1.0, description="How far the implicit policies are from the old one; 1 or .1.")
    z: PositiveFloat = Field(
        5.0, description="Advantage at which a sample is wholly good: 5 in the code, 1 where the paper's Z is the std."
    )
    old: DecayConfig = Field(DecayConfig(), description="The old policy, which also samples.")
    kl_weight: NonNegativeFloat = Field(
        1e-4, description="Weight of the mean squared difference to the velocity of the generator as it was."
    )


class AwmConfig(Section):
    """Advantage Weighted Matching: pretraining's loss weighted by the advantage, with one clipped ratio a sample."""

    name: Literal["awm"]
    form: Literal["paper", "code"] = Field(
        "code", description="paper: -w(t) l stands for the log-likelihood; code: -(t / power) (l^power), ghuber."
    )
    time_weight: Literal["uniform", "t", "t2"] = Field("uniform", description="w(t) of form 'paper'.")
    power: Annotated[float, Field(gt=0, le=1)] = Field(0.25, description="Of form 'code'.")
    clip_range: PositiveFloat = Field(1.0, description="Half-width of the accepted range of the ratio around 1.")
    advantage_scale: PositiveFloat = Field(
        0.2, description="Factor on the advantages: the code divides by 5, at which it clips them."
    )
    kl_weight: NonNegativeFloat = Field(
        3e-3, description="Weight of the mean squared difference to the velocity of the generator as it was."
    )
    anchor_weight: NonNegativeFloat = Field(1.0, description="The same to that of the slow policy `anchor`.")
    anchor: DecayConfig = Field(DecayConfig(hold=0.3), description="An average of the trained weights.")
