"""Section `optimizer`: what a step makes of the gradient."""

from typing import Annotated, Literal

from pydantic import Field

from vipo.config.parts import by_name
from vipo.config.section import LARGEST_INT, NonNegativeFloat, PositiveFloat, Section

_FP32 = 4
_BLOCK = 256
"""Values of 8-bit state that share a scale."""

Share = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Section):
    """What all of them have."""

    name: str
    learning_rate: PositiveFloat = 1e-5
    max_grad_norm: PositiveFloat = Field(1.0, description="Longer gradients are cut to this length, before the step.")
    warmup_updates: Annotated[int, Field(ge=0, le=LARGEST_INT)] = Field(
        0, description="Updates in which the rate rises in equal steps; the last of them has the whole rate."
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="The rate after the warm-up; cosine: half a cosine, which would be 0 one update later."
    )

    @property
    def is_constant(self) -> bool:
        """Whether all updates have one rate."""
        return self.schedule == "constant" and not self.warmup_updates

    @property
    def title(self) -> str:
        """What people call it."""
        raise NotImplementedError

    @property
    def state_bytes(self) -> float:
        """Of its state, for each trained parameter."""
        raise NotImplementedError


class _Adam(_Optimizer):
    """AdamW, however its moments are held."""

    weight_decay: NonNegativeFloat = 1e-4
    betas: tuple[Share, Share] = Field((0.9, 0.999), strict=False)


class AdamWConfig(_Adam):
    """AdamW on fp32 weights."""

    name: Literal["adamw"] = "adamw"
    fused: bool = Field(
        True, description="One kernel for all weights; false: PyTorch's kernels for lists of tensors. Bits differ."
    )

    @property
    def title(self) -> str:
        """What people call it."""
        return "AdamW"

    @property
    def state_bytes(self) -> float:
        """Two moments."""
        return 2 * _FP32


class AdamW8bitConfig(_Adam):
    """AdamW whose moments are held in 8 bits, by bitsandbytes; of tensors with fewer than 4096 values in fp32."""

    name: Literal["adamw_8bit"]

    @property
    def title(self) -> str:
        """What people call it."""
        return "8-bit AdamW"

    @property
    def state_bytes(self) -> float:
        """Two moments of a byte, and a scale for each block."""
        return 2 * (1 + _FP32 / _BLOCK)


class SgdConfig(_Optimizer):
    """Gradient descent: the step keeps the direction of the gradient, or of its running sum."""

    name: Literal["sgd"]
    learning_rate: PositiveFloat = 1e-2
    momentum: Share = Field(0.0, description="m <- momentum m + gradient; the step is -learning_rate m.")

    @property
    def title(self) -> str:
        """What people call it."""
        return f"SGD with momentum {self.momentum:g}" if self.momentum else "SGD"

    @property
    def state_bytes(self) -> float:
        """The running sum, where there is one."""
        return _FP32 if self.momentum else 0


class NormalisedConfig(_Optimizer):
    """Gradient descent by steps of one length, that of `learning_rate`, in the direction of a running mean."""

    name: Literal["normalised"]
    learning_rate: PositiveFloat = Field(1e-2, description="Length of a step, over all trained weights together.")
    momentum: Share = Field(0.9, description="m <- momentum m + (1 - momentum) gradient; the step is along -m.")

    @property
    def title(self) -> str:
        """What people call it."""
        return f"normalised gradient with momentum {self.momentum:g}"

    @property
    def state_bytes(self) -> float:
        """The running mean."""
        return _FP32


OptimizerConfig = Annotated[
    AdamWConfig | AdamW8bitConfig | SgdConfig | NormalisedConfig,
    by_name(AdamWConfig, AdamW8bitConfig, SgdConfig, NormalisedConfig),
]
