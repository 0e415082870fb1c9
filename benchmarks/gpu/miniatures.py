"""The same families in miniature, for the test on a CPU."""

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.gpu.size import FULL, HERE, LORA, Size, evaluated, update_of, window

_SMALL = (
    f"perception.backbone='{HERE}:dinov2_small'",
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


def _small_sd3(training: tuple[str, ...]) -> Size:
    return Size(
        family=f"{HERE}:RandomStableDiffusion3",
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
        overrides=(
            *update_of(2, 4),
            *_SMALL,
            *training,
            "generator.guidance_scale=4",
        ),
        setting="Stable Diffusion 3.5 in miniature",
    )


TINY: Mapping[str, Size] = MappingProxyType(
    {
        "flux": Size(
            family=f"{HERE}:RandomFlux",
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
            overrides=(
                *update_of(2, 4),
                *LORA,
                *_SMALL,
            ),
            setting="FLUX.1 in miniature",
        ),
        "wan": Size(
            family=f"{HERE}:RandomWan",
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
            overrides=(
                *update_of(1, 2),
                *LORA,
                *_SMALL,
                "generator.frames=5",
                "generator.guidance_scale=5",
            ),
            setting="Wan 2.1 in miniature",
        ),
        "sd3_lora": _small_sd3((*LORA, *evaluated(48, 2))),
        "sd3_full": _small_sd3(FULL),
        # As many steps as the latest window among the options ends with.
        "sd3_window": _small_sd3((*LORA, *window(4), "sampling.steps=7")),
        "qwen_image_21": Size(
            family=f"{HERE}:RandomQwenImage21",
            parts={
                "transformer": {
                    "in_channels": 8,
                    "out_channels": 8,
                    "num_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "context_in_dim": 32,
                    "axes_dims_rope": [4, 6, 6],
                },
                "vae": {
                    **{"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1] * 5, "num_res_blocks": 1},
                    **{"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
                },
            },
            overrides=(*update_of(2, 4), *LORA, *window(4), *_SMALL),
            setting="Qwen-Image 2.1 in miniature",
        ),
    }
)
