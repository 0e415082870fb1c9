"""What is measured: families at real size."""

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.gpu.size import FULL, HERE, LORA, Size, evaluated, update_of, window

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


_DINO = f"perception.backbone='{HERE}:dinov2_large'"

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


def _sd35_medium(training: tuple[str, ...], setting: str, learned: str = "4 trained, 4 samples") -> Size:
    return Size(
        family=f"{HERE}:RandomStableDiffusion3",
        parts=_SD35_MEDIUM,
        overrides=(
            *update_of(4, 4),
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
            (*LORA, *window(8)), "LoRA 16, frozen weights bf16", "a window of 2 trained, 8 samples"
        ),
        "flux": Size(
            family=f"{HERE}:RandomFlux",
            # The class's own defaults are FLUX.1's.
            parts={
                "transformer": {"guidance_embeds": True, "joint_attention_dim": 4096, "pooled_projection_dim": 768},
                "vae": _FLUX_AUTOENCODER,
            },
            overrides=(
                *update_of(4, 4),
                *LORA,
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
            family=f"{HERE}:RandomWan",
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
            overrides=(
                *update_of(9, 1),
                # Of twice as many, two updates and what they are compared with would be longer than a step may take.
                "training.group_size=2",
                *LORA,
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
        "sd3_full": _sd35_medium(FULL, "all weights, fp32"),
        "sd3_lora": _sd35_medium((*LORA, *evaluated(1024, 20)), "LoRA 16, frozen weights bf16"),
        "qwen_image_21": Size(
            family=f"{HERE}:RandomQwenImage21",
            # The classes' own defaults are Qwen-Image 2.1's.
            parts={"transformer": {"context_in_dim": 4096}, "vae": {}},
            overrides=(
                *update_of(2, 8),
                *LORA,
                *window(8),
                _DINO,
                "generator.height=512",
                "generator.width=512",
                "generator.max_sequence_length=256",
                "generator.guidance_scale=1",
                "sampling.steps=10",
                "sampling.shift=3",
                "sampling.eta=0.3",
            ),
            setting="Qwen-Image 2.1, 7 B, LoRA 16, frozen weights bf16, 512 x 512, no guidance, 10 steps, "
            "a window of 2 trained, 8 samples",
        ),
    }
)
