"""Random checkpoints of the picture families beside Stable Diffusion 1.x, in the smallest size."""

from pathlib import Path

import torch
from checkpoints import clip_text_model, clip_tokenizer, diffusion_scheduler, picture_autoencoder, t5_tokenizer
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel


def t5_encoder(width: int) -> T5EncoderModel:
    """For `t5_tokenizer`."""
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4))


def projecting_clip(projection: int) -> CLIPTextModelWithProjection:
    """For `clip_tokenizer`, with a pooled embedding of `projection`."""
    return CLIPTextModelWithProjection(clip_text_model(projection).config)


def write_flux(folder: Path) -> Path:
    """FLUX.1-dev: guidance embedded, levels shifted by the number of tokens; sides in multiples of 4."""
    torch.manual_seed(0)
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=picture_autoencoder(shift=0.12),
        text_encoder=clip_text_model(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def write_stable_diffusion_3(folder: Path, t5: bool = True) -> Path:
    """Stable Diffusion 3.5 medium: dual attention in the first block; sides in multiples of 4."""
    torch.manual_seed(0)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=80,
            caption_projection_dim=32,
            pooled_projection_dim=56,
            pos_embed_max_size=24,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=picture_autoencoder(shift=0.06),
        text_encoder=projecting_clip(32),
        tokenizer=clip_tokenizer(),
        text_encoder_2=projecting_clip(24),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(80) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)
    return folder


def write_stable_diffusion_xl(folder: Path, prediction: str = "epsilon") -> Path:
    """Stable Diffusion XL base: pictures with even sides; an empty negative prompt is zeros."""
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=picture_autoencoder(),
        text_encoder=clip_text_model(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=projecting_clip(24),
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            norm_num_groups=4,
        ),
        scheduler=diffusion_scheduler(prediction),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return folder
