"""Random checkpoints of the video families beside Wan, in the smallest size."""

from pathlib import Path

import torch
from checkpoints import t5_tokenizer
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from language_checkpoints import qwen_tokenizer
from picture_checkpoints import t5_encoder
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel


def write_hunyuan_video(folder: Path) -> Path:
    """HunyuanVideo 1.5: sides in multiples of 4, 1 + 4 k frames; its guidance is a part of the checkpoint."""
    torch.manual_seed(0)
    HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=264,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            )
        ),
        tokenizer=qwen_tokenizer(),
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            text_embed_2_dim=32,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
            target_size=32,
            task_type="t2v",
        ),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    ).save_pretrained(folder)
    return folder


def write_cogvideox(folder: Path, rotary: bool = False, pairs: bool = False) -> Path:
    """CogVideoX 2B, rotary 5B, with pairs of latent frames 1.5: no signal at the first timestep; sides in
    multiples of 8."""
    torch.manual_seed(0)
    CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(32),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            scaling_factor=0.7,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=2,
            sample_width=12,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=12,
            use_rotary_positional_embeddings=rotary,
            patch_size_t=2 if pairs else None,
            patch_bias=not pairs,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=1.0 if rotary else 3.0,
            clip_sample=False,
        ),
    ).save_pretrained(folder)
    return folder
