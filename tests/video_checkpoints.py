"""Random checkpoints of the video families beside Wan, in the smallest size."""

import string
from pathlib import Path
from typing import Any

import torch
from checkpoints import t5_tokenizer
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from language_checkpoints import qwen_tokenizer
from picture_checkpoints import t5_encoder
from transformers import (
    ByT5Tokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)


def write_hunyuan_video(folder: Path) -> Path:
    """HunyuanVideo 1.5: sides in multiples of 4, 1 + 4 k frames; its guider has another scale than its row."""
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
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
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


def ltx2_network(modulated: bool) -> LTX2VideoTransformer3DModel:
    """Of LTX-2, or as `write_ltx2` says of 2.3."""
    keys = ("gated_attn", "audio_gated_attn", "cross_attn_mod", "audio_cross_attn_mod", "perturbed_attn")
    return LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        vae_scale_factors=(4, 16, 16),
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=6,
        audio_cross_attention_dim=12,
        num_layers=2,
        caption_channels=16,
        rope_type="split",
        use_prompt_embeddings=not modulated,
        **dict.fromkeys(keys, modulated),
    )


def write_ltx2(folder: Path, modulated: bool = False) -> Path:
    """LTX-2: sides in multiples of 32, 1 + 4 k frames, prompts in multiples of 8 tokens.

    With modulated attention to the text, gates and a projection for each half it is 2.3; its autoencoder takes a noise
    level.
    """
    torch.manual_seed(0)
    text = {"vocab_size": 112, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    pieces = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable.replace(" ", ""))
    connectors: dict[str, Any] = {
        f"{half}_connector_{key}": value
        for half in ("video", "audio")
        for key, value in {"num_attention_heads": 2, "num_layers": 1, "num_learnable_registers": 8}.items()
    }
    widths = {"video": 12 if modulated else 8, "audio": 6 if modulated else 8}
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(16, 32),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        timestep_conditioning=modulated,
        decoder_causal=False,
        scaling_factor=0.8,
    )
    vae.latents_mean.copy_(torch.randn(4))
    vae.latents_std.copy_(1 + torch.rand(4))
    LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.95, max_shift=2.05
        ),
        vae=vae,
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        ),
        text_encoder=Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)),
        tokenizer=GemmaTokenizer(vocab={piece: row for row, piece in enumerate(pieces)}, merges=[]),
        connectors=LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=3,
            **connectors,
            **{f"{half}_connector_attention_head_dim": width for half, width in widths.items()},
            rope_type="split",
            per_modality_projections=modulated,
            video_hidden_dim=24,
            audio_hidden_dim=12,
            video_gated_attn=modulated,
            audio_gated_attn=modulated,
        ),
        transformer=ltx2_network(modulated),
        vocoder=LTX2Vocoder(
            in_channels=16,
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        ),
    ).save_pretrained(folder)
    return folder
