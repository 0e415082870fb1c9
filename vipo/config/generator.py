"""Section `generator`."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from vipo.config.registries import FAMILIES, registered
from vipo.config.section import DEVICE, MOST_PIXELS, Commit, Section, UserPath

DEFAULT_ATTENTION = "default"

ATTENTION = (DEFAULT_ATTENTION, "native", "_native_flash", "_native_efficient", "_native_math")
"""Attention backends of diffusers that can be trained through and whose backward pass is the same twice."""

NOT_TRAINED_THROUGH: Mapping[str, str] = MappingProxyType(
    {
        "flash": "its backward pass adds up in no fixed order, and diffusers does not ask it to: the same run would "
        "end otherwise twice; '_native_flash' is PyTorch's own FlashAttention, whose order is fixed",
        "_flash": "diffusers calls it without a backward pass",
        "sage": "it has no backward pass",
        "_sage": "it has no backward pass",
        "_native_cudnn": "its backward pass adds up in no fixed order, for which PyTorch refuses it in training",
        "xformers": "whether its backward pass adds up in a fixed order is not known here",
        "flex": "without the compiler around it, it holds the whole attention matrix",
    }
)
"""Why a training does not take other backends, by what their names begin with; hub kernels are fetched code."""


class GeneratorConfig(Section):
    """Which generator is post-trained and how it is called."""

    family: str = Field(
        "flux", description=f"Generator adapter: {', '.join(FAMILIES)}, or an import path 'package.module:object'."
    )
    path: UserPath = Field(description="Folder in the diffusers pipeline layout, or a hub id.")
    revision: Commit | None = Field(
        None, description="Commit of the hub repository, all 40 digits, where `path` is a hub id."
    )
    file: UserPath | None = Field(
        None,
        description="A .safetensors file with the network's weights, in any naming that diffusers reads; everything "
        "else is read from `path`.",
    )
    file_2: UserPath | None = Field(
        None, description="The same of the network for low noise, where a family has two; `file` is the other's then."
    )
    start: UserPath | None = Field(
        None,
        description="What training starts from: a LoRA's .safetensors file or the folder of an adapter that peft "
        "saved, which is merged, or the folder of a trained run of the same checkpoint.",
    )
    start_scale: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = Field(
        1.0, description="Of the LoRA in `start`, beside its own."
    )
    height: Annotated[int, Field(ge=1, le=2**14)] = Field(description="Image height in pixels.")
    width: Annotated[int, Field(ge=1, le=2**14)] = Field(description="Image width in pixels.")
    frames: Annotated[int, Field(ge=1, le=2**14)] | None = Field(
        None, description="Frames of a video; null for pictures."
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=2**14)] = Field(
        512, description="Text tokens for the sequence encoder, of families that have one."
    )
    guidance_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        3.5,
        description="Embedded guidance of guidance-distilled models ('flux'), or classifier-free guidance, off at 1 "
        "and below.",
    )
    guidance_scale_2: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        None, description="Of the network for low noise, where a family has two; null: `guidance_scale`."
    )
    experts: Literal["both", "high_noise", "low_noise"] = Field(
        "both", description="Which networks are trained, where a family has two."
    )
    negative_prompt: str = Field("", description="The prompt that classifier-free guidance leads away from.")
    encoders: Literal["fp32", "bf16"] = Field(
        "fp32", description="In what text encoders are held and compute; embeddings are kept in it."
    )
    encoder_batch: Annotated[int, Field(ge=1, le=4096)] = Field(
        1,
        description="Prompts that the text encoders read in one call. More are faster, and rounded as their batch is: "
        "a prompt's embedding then depends on its neighbours, within rounding.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: autocast of the network in rollout, update and evaluation; what is trained stays fp32.",
    )
    weights: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="In what the network's frozen weights are held, under training.lora. bf16 halves them; needs "
        "precision bf16, which computes with them in bf16 in either case. What is trained is fp32.",
    )
    attention: str = Field(
        DEFAULT_ATTENTION,
        description=f"Attention backend of diffusers: {', '.join(ATTENTION)}. default: PyTorch chooses a kernel for "
        "each call.",
    )
    compile: Literal["none", "blocks"] = Field(
        "none",
        description="blocks: the network's repeated blocks are compiled (torch.compile), for each shape that they are "
        "called with.",
    )
    decoding: Literal["whole", "tiled"] = Field(
        "whole",
        description="tiled: the autoencoder decodes overlapping tiles of a sample and blends their seams, as "
        "enable_tiling of diffusers has it: less memory, other pixels.",
    )
    device: str = Field(
        "cpu",
        pattern=DEVICE,
        description="'cpu', 'cuda' or 'cuda:N' (N at most 99); a device that is absent is an error, never replaced.",
    )

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        return registered(value, FAMILIES, "generator family")

    @field_validator("attention")
    @classmethod
    def _trained_through(cls, value: str) -> str:
        if value not in ATTENTION:
            why = (why for start, why in NOT_TRAINED_THROUGH.items() if value.startswith(start))
            fetched = "its code is fetched from the hub, which vipo runs nothing of" if value.endswith("_hub") else None
            told = fetched or next(why, "diffusers has no such backend, or it is for other devices")
            raise ValueError(f"{value!r}: {told}; one of {', '.join(ATTENTION)}")
        return value

    @model_validator(mode="after")
    def _runs_there(self) -> Self:
        if self.attention == "_native_efficient" and self.device == "cpu":
            raise ValueError("attention '_native_efficient' has kernels for CUDA devices alone; set attention=default")
        if self.attention == "_native_flash" and self.device != "cpu" and self.precision != "bf16":
            raise ValueError(
                "attention '_native_flash' has kernels for bf16 alone on CUDA devices; set precision=bf16, or "
                "attention=default"
            )
        return self

    @model_validator(mode="after")
    def _scales_something(self) -> Self:
        if self.start is None and self.start_scale != 1:
            raise ValueError(f"start_scale {self.start_scale:g} has no effect: start is not set")
        return self

    @model_validator(mode="after")
    def _both_files(self) -> Self:
        if self.file is None and self.file_2 is not None:
            raise ValueError("file_2 is the file of a second network: set file, the first one's, too")
        return self

    @model_validator(mode="after")
    def _computed_as_held(self) -> Self:
        if self.weights == "bf16" and self.precision != "bf16":
            raise ValueError(
                "weights bf16 needs precision bf16: in fp32 the network would compute with weights that were rounded"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if math.prod(self.sample_shape) > 3 * MOST_PIXELS:
            raise ValueError(
                f"a sample of {math.prod(self.sample_shape) // 3} pixels (height * width * frames) is more than the "
                f"{MOST_PIXELS} that fit; lower one of them"
            )
        return self

    @property
    def chooses_kernels(self) -> bool:
        """Whether the network computes otherwise than PyTorch's own choice of kernels."""
        return (self.attention, self.compile) != (DEFAULT_ATTENTION, "none")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one decoded sample: ``(3, height, width)``, or ``(frames, 3, height, width)`` of a video."""
        picture = (3, self.height, self.width)
        return picture if self.frames is None else (self.frames, *picture)
