"""Random checkpoints of Qwen-Image and of Qwen-Image 2.1, in the smallest size."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from language_checkpoints import qwen_tokenizer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

# As of Qwen3-VL, whose messages are texts or lists of parts.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


def write_qwen_image(folder: Path) -> Path:
    """Qwen-Image: pictures with sides in multiples of 16, levels shifted by the number of tokens."""
    torch.manual_seed(0)
    vision = {**_VISION, "fullatt_block_indexes": [0]}
    text = {**_TEXT, "vocab_size": 264}
    QwenImagePipeline(
        scheduler=_scheduler(),
        vae=AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, **_normal(4)),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)
    return folder


def write_qwen_image_21(folder: Path) -> Path:
    """Qwen-Image 2.1: pictures with sides in multiples of 32, and with transparency."""
    torch.manual_seed(0)
    marks = {name: f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    tokenizer = qwen_tokenizer(*marks.values())
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    text = {**_TEXT, "vocab_size": 264, "head_dim": 8}
    vision = {**_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    QwenImage21Pipeline(
        scheduler=_scheduler(),
        vae=AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, z_dim=8, dim_mult=[1] * 5, num_res_blocks=1, **_normal(8)
        ),
        text_encoder=Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config=text,
                vision_config=vision,
                image_token_id=ids["image_pad"],
                video_token_id=ids["video_pad"],
                vision_start_token_id=ids["vision_start"],
                vision_end_token_id=ids["vision_end"],
            )
        ),
        processor=Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(),
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(),
            chat_template=_CHAT,
        ),
        transformer=QwenImage21Transformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)
    return folder


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
    )


def _normal(channels: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents_mean": torch.randn(channels, generator=generator).tolist(),
        "latents_std": (1 + torch.rand(channels, generator=generator)).tolist(),
    }
