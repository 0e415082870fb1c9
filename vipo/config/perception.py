"""Section `perception`."""

from typing import Annotated, Literal

from pydantic import Field

from vipo.config.section import Commit, Section, UserPath

PACKAGED = "efficientnet_lite0"
"""The backbone whose weights a Python package brings."""


class PerceptionConfig(Section):
    """The Perceptual Structuring Module: backbone, allocation map and its orientation."""

    backbone: str = Field(
        PACKAGED,
        description="'efficientnet_lite0' (packaged weights), any timm name, 'hf-hub:owner/name', or an import path.",
    )
    weights: UserPath | None = Field(
        None,
        description="Local weights (safetensors), or folder of a timm or transformers model; null: the package's or "
        "the hub's.",
    )
    revision: Commit | None = Field(
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
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="In what the backbone is held and computes; what is made of its features is fp32."
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
