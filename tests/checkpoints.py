"""Random checkpoints of each generator family in the smallest size, in the stock pipelines' own layout."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Tokenizer, UMT5Config, UMT5EncoderModel

from vipo.config.generator import GeneratorConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def t5_tokenizer() -> T5Tokenizer:
    """One token a letter."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def clip_tokenizer() -> CLIPTokenizer:
    """One token a letter, 16 tokens a prompt."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)


def clip_text_model(projection: int = 512) -> CLIPTextModel:
    """Width 32, for `clip_tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=32,
            projection_dim=projection,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def picture_autoencoder(shift: float | None = None) -> AutoencoderKL:
    """Four latent channels, half the picture's side."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=shift,
    )


def _wan_network(channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def _write_wan(
    folder: Path, channels: int, vae: Mapping[str, object], shift: float, *, pair: bool = False, **options: object
) -> Path:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        ),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=channels,
            dim_mult=[1] * 4,
            num_res_blocks=1,
            latents_mean=torch.randn(channels, generator=generator).tolist(),
            latents_std=(1 + torch.rand(channels, generator=generator)).tolist(),
            **vae,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=_wan_network(channels),
        transformer_2=_wan_network(channels) if pair else None,
        **options,
    ).save_pretrained(folder)
    return folder


def write_wan(folder: Path) -> Path:
    """Wan 2.1: videos with sides in multiples of 16 and 1 + 4 k frames."""
    return _write_wan(folder, 16, {}, shift=3.0)


def write_wan22_a14b(folder: Path) -> Path:
    """Wan 2.2 T2V-A14B: two transformers, the first for noise levels from 0.875 on; otherwise as Wan 2.1."""
    return _write_wan(folder, 16, {}, shift=3.0, pair=True, boundary_ratio=0.875)


def write_wan22_ti2v(folder: Path) -> Path:
    """Wan 2.2 TI2V-5B: its autoencoder takes 2 x 2 pixels as channels; sides in multiples of 32."""
    vae = {
        "decoder_base_dim": 4,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    }
    return _write_wan(folder, 8, vae, shift=5.0, expand_timesteps=True)


def diffusion_scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's, in whose chain noise or v is predicted."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def write_stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion 1.x: pictures with even sides."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=picture_autoencoder(),
        text_encoder=clip_text_model(),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=diffusion_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the one safetensors file in a folder."""
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def faulty(tensors: dict[str, Tensor]) -> list[str]:
    """Make one tensor missing, one extra, one of another shape, one of integers, one not finite; gives their names."""
    # Nothing reads a language model's head, so that it may be missing.
    missing, misshapen, whole, broken = sorted(tensors.keys() - {"lm_head.weight"})[:4]
    del tensors[missing]
    tensors["lora_A.weight"] = torch.ones(2)
    tensors[misshapen] = torch.ones(3, 5)
    tensors[whole] = torch.zeros(tensors[whole].shape, dtype=torch.int32)
    tensors[broken] = torch.full_like(tensors[broken], float("nan"))
    return [
        f"missing: {missing}",
        "extra: lora_A.weight",
        f"of another shape: {misshapen} (3, 5) instead of",
        f"not of floating point: {whole} (I32)",
        f"not finite: {broken}",
    ]


def generator_config(family: str, path: Path, **changes: object) -> GeneratorConfig:
    """Of a tiny checkpoint of a family, with `changes`."""
    values: dict[str, object] = {
        "family": family,
        "path": str(path),
        "height": 32,
        "width": 32,
        "frames": 5 if family == "wan" else None,
        "max_sequence_length": 512 if family == "sd" else 16,
        "guidance_scale": 0.0 if family == "flux" else 4.0,
    }
    return GeneratorConfig.model_validate(values | changes)
