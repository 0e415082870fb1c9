"""What is measured: families at real size, and the same in miniature for the test on a CPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.gpu.random_weights import write_layout

_HERE = "benchmarks.gpu.random_weights"

_PICTURE_BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
_FLUX_AUTOENCODER = {
    **_PICTURE_BLOCKS,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class Size:
    """One row of the table: a family at one size.

    Attributes:
        family: import path of its class with random weights.
        parts: configurations of network and autoencoder.
        dtype: of the network's weights.
        overrides: Hydra overrides; one prompt, few samples, one optimizer step.
        setting: what stands in the table.
    """

    family: str
    parts: Mapping[str, Mapping[str, Any]]
    dtype: str
    overrides: tuple[str, ...]
    setting: str


def family_overrides(size: Size, folder: Path, device: str) -> list[str]:
    """Hydra overrides of a run of `size` on `device`; its layout and prompts are written below `folder`."""
    layout = write_layout(folder / "generator", size.parts, size.dtype)
    (folder / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(24)))
    return [
        "experiment=demo",
        "arm=vipo",
        "prompts=file",
        "reward=redness",
        "perception.layer=null",
        "perception.orientation=border",
        "training.save_at=[]",
        "evaluation.rewards=[redness]",
        "evaluation.prompts=2",
        f"prompts.source={folder / 'prompts.txt'}",
        f"generator.family='{size.family}'",
        f"generator.path={layout}",
        f"generator.device={device}",
        *size.overrides,
    ]


def _update(transitions: int, micro_batch: int) -> tuple[str, ...]:
    return (
        "training.updates=2",
        "training.prompts_per_update=1",
        "training.group_size=4",
        "training.optimizer_steps_per_update=1",
        f"training.trained_transitions={transitions}",
        f"training.micro_batch={micro_batch}",
        # What is measured is not refused: the figure stands beside the tolerance.
        "training.log_ratio_tolerance=1e9",
    )


def _evaluated(side: int, steps: int) -> tuple[str, ...]:
    """Samples of two prompts, in one batch."""
    return (f"evaluation.height={side}", f"evaluation.width={side}", f"evaluation.steps={steps}")


def _window(samples: int) -> tuple[str, ...]:
    return (
        "sampling.window={size: 2}",
        "training.trained_transitions=2",
        f"training.group_size={samples}",
        f"training.micro_batch={samples}",
    )


_FULL = ("training.gradient_checkpointing=true", "generator.precision=bf16")
_LORA = ("training.lora={rank: 16, alpha: 16}", "generator.weights=bf16", *_FULL)
_DINO = f"perception.backbone='{_HERE}:dinov2_large'"

_SD35_MEDIUM = {
    "transformer": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    },
    "vae": {**_FLUX_AUTOENCODER, "scaling_factor": 1.5305, "shift_factor": 0.0609},
}


def _sd35_medium(dtype: str, training: tuple[str, ...], setting: str, learned: str = "4 trained, 4 samples") -> Size:
    return Size(
        family=f"{_HERE}:RandomStableDiffusion3",
        parts=_SD35_MEDIUM,
        dtype=dtype,
        overrides=(
            *_update(4, 4),
            *training,
            _DINO,
            "generator.height=512",
            "generator.width=512",
            "generator.max_sequence_length=256",
            "generator.guidance_scale=4.5",
            "sampling.steps=10",
            "sampling.shift=3",
            "sampling.eta=0.3",
        ),
        setting=f"SD3.5 medium, 2.2 B, {setting}, 512 x 512, CFG, 10 steps, {learned}",
    )


# In the order of the steps: what counts their plans may be ended by its limit.
REAL: Mapping[str, Size] = MappingProxyType(
    {
        # What is compared with others' images per GPU-hour.
        "sd3_window": _sd35_medium(
            "bfloat16", (*_LORA, *_window(8)), "LoRA 16, frozen weights bf16", "a window of 2 trained, 8 samples"
        ),
        "flux": Size(
            family=f"{_HERE}:RandomFlux",
            # The class's own defaults are FLUX.1's.
            parts={
                "transformer": {"guidance_embeds": True, "joint_attention_dim": 4096, "pooled_projection_dim": 768},
                "vae": _FLUX_AUTOENCODER,
            },
            dtype="bfloat16",
            overrides=(
                *_update(4, 4),
                *_LORA,
                _DINO,
                "generator.height=512",
                "generator.width=512",
                "sampling.steps=8",
                "sampling.shift=3",
                "sampling.eta=0.3",
            ),
            setting="FLUX.1-dev, 12 B, LoRA 16, frozen weights bf16, 512 x 512, 8 steps, 4 trained, 4 samples",
        ),
        "wan": Size(
            family=f"{_HERE}:RandomWan",
            parts={
                "transformer": {
                    "num_attention_heads": 12,
                    "attention_head_dim": 128,
                    "ffn_dim": 8960,
                    "num_layers": 30,
                    "text_dim": 4096,
                },
                "vae": {},
            },
            dtype="bfloat16",
            overrides=(
                *_update(9, 1),
                # Of twice as many, two updates and what they are compared with would be longer than a step may take.
                "training.group_size=2",
                *_LORA,
                _DINO,
                "generator.height=240",
                "generator.width=416",
                "generator.frames=53",
                "generator.guidance_scale=5",
                "sampling.steps=16",
                "sampling.shift=8",
                "sampling.eta=0.25",
            ),
            setting="Wan 2.1 1.3 B, LoRA 16, frozen weights bf16, 240 x 416 x 53, CFG, 16 steps, 9 trained, 2 samples",
        ),
        "sd3_full": _sd35_medium("float32", _FULL, "all weights, fp32"),
        "sd3_lora": _sd35_medium("bfloat16", (*_LORA, *_evaluated(1024, 20)), "LoRA 16, frozen weights bf16"),
    }
)

_SMALL = (
    f"perception.backbone='{_HERE}:dinov2_small'",
    "perception.input_size=56",
    "generator.height=32",
    "generator.width=32",
    "generator.max_sequence_length=8",
    "sampling.steps=3",
)

_SMALL_AUTOENCODER = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "shift_factor": 0.1,
}


def _small_sd3(dtype: str, training: tuple[str, ...]) -> Size:
    return Size(
        family=f"{_HERE}:RandomStableDiffusion3",
        parts={
            "transformer": {
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 32,
                "pos_embed_max_size": 24,
                "dual_attention_layers": [0],
                "qk_norm": "rms_norm",
            },
            "vae": _SMALL_AUTOENCODER,
        },
        dtype=dtype,
        overrides=(
            *_update(2, 4),
            *training,
            *_SMALL,
            "generator.guidance_scale=4",
        ),
        setting="Stable Diffusion 3.5 in miniature",
    )


TINY: Mapping[str, Size] = MappingProxyType(
    {
        "flux": Size(
            family=f"{_HERE}:RandomFlux",
            parts={
                "transformer": {
                    "in_channels": 16,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 32,
                    "guidance_embeds": True,
                    "axes_dims_rope": [4, 6, 6],
                },
                "vae": _SMALL_AUTOENCODER,
            },
            dtype="bfloat16",
            overrides=(
                *_update(2, 4),
                *_LORA,
                *_SMALL,
            ),
            setting="FLUX.1 in miniature",
        ),
        "wan": Size(
            family=f"{_HERE}:RandomWan",
            parts={
                "transformer": {
                    "num_attention_heads": 2,
                    "attention_head_dim": 12,
                    "text_dim": 32,
                    "freq_dim": 32,
                    "ffn_dim": 32,
                    "num_layers": 1,
                    "rope_max_seq_len": 64,
                },
                "vae": {"base_dim": 4, "z_dim": 16, "dim_mult": [1] * 4, "num_res_blocks": 1},
            },
            dtype="bfloat16",
            overrides=(
                *_update(1, 2),
                *_LORA,
                *_SMALL,
                "generator.frames=5",
                "generator.guidance_scale=5",
            ),
            setting="Wan 2.1 in miniature",
        ),
        "sd3_lora": _small_sd3("bfloat16", (*_LORA, *_evaluated(48, 2))),
        "sd3_full": _small_sd3("float32", _FULL),
        "sd3_window": _small_sd3("bfloat16", (*_LORA, *_window(4))),
    }
)
