"""Qwen-Image (`QwenImageTransformer2DModel`): packed latents, a masked prompt, guidance that keeps the token's norm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from vipo.config.generator import GeneratorConfig
from vipo.generators import templates
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, checkpoint_location
from vipo.generators.packing import pack_latents, unpack_latents
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import load_text_encoder, padded_rows, with_negative
from vipo.generators.variants import refuse_channels, refuse_settings
from vipo.generators.words import QWEN_IMAGE

_NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "guidance_embeds": "takes the guidance scale as an embedding",
        "zero_cond_t": "takes pictures as well (Qwen-Image-Edit)",
        "use_additional_t_cond": "takes a second condition beside the time (Qwen-Image-Layered)",
        "use_layer3d_rope": "makes several layers (Qwen-Image-Layered)",
    }
)
_SEQUENCE = "encoder_hidden_states"


class QwenGenerator(PipelineGenerator):
    """What Qwen-Image and 2.1 share; `generator.guidance_scale` is the stock pipelines' ``true_cfg_scale``."""

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self._mean, self._std = self.latent_scales(2)

    @classmethod
    def stock_arguments(cls, config: GeneratorConfig) -> Mapping[str, object]:
        # Without a negative prompt, the stock pipeline is not guided.
        return {
            "guidance_scale": None,
            "true_cfg_scale": config.guidance_scale,
            "negative_prompt": config.negative_prompt,
        }

    def decode(self, latents: Tensor) -> Tensor:
        pictures = self.vae.decode((latents * self._std + self._mean).unsqueeze(2), return_dict=False)[0][:, :, 0]
        return self.opaque((pictures.float() / 2 + 0.5).clamp(0, 1))


class QwenImageGenerator(QwenGenerator):
    """Qwen-Image."""

    text_attention: ClassVar[TextAttention | None] = QWEN_IMAGE
    pipeline_class: ClassVar[Any] = QwenImagePipeline
    network_class: ClassVar[Any] = QwenImageTransformer2DModel
    autoencoders: ClassVar[Mapping[str, Any]] = MappingProxyType({"AutoencoderKLQwenImage": AutoencoderKLQwenImage})
    token_side: ClassVar[int | None] = 2
    longest_sequence: ClassVar[int | None] = 1024
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({_SEQUENCE: "joint_attention_dim"})
    masks: ClassVar[tuple[str, ...]] = (f"{_SEQUENCE}_mask",)

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        scale = 2 ** len(vae.config.temperal_downsample)
        self.check_size(2 * scale)
        self.latent_shape = (network.config.in_channels // 4, config.height // scale, config.width // scale)

    @classmethod
    def to_stock(cls, latents: Tensor) -> Tensor:
        return pack_latents(latents)

    @classmethod
    def from_stock(cls, stepped: Tensor, shape: torch.Size) -> Tensor:
        return unpack_latents(stepped, *shape[-2:])

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        refuse_settings(location, "transformer", network, _NEEDS)
        # Its out_channels are those of one latent pixel.
        taken = {"in_channels": network.in_channels, "out_channels": 4 * (network.out_channels or 0)}
        refuse_channels(
            location, "transformer", SimpleNamespace(**taken), ("z_dim", vae.z_dim), "editing checkpoints", folded=4
        )

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location, length = checkpoint_location(config, root), config.max_sequence_length
        template, dropped = templates.qwen_image()
        tokenizer, encoder = load_text_encoder(
            config,
            location,
            (Qwen2Tokenizer, "tokenizer"),
            (Qwen2_5_VLForConditionalGeneration, "text_encoder"),
            [*texts, config.negative_prompt],
            length + dropped,
            template,
        )
        pipeline = QwenImagePipeline(None, None, encoder, tokenizer, None)

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            found, mask = pipeline.encode_prompt(prompts, config.device, max_sequence_length=length)
            return padded_rows(found, mask, length, _SEQUENCE)

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        _, height, width = self.latent_shape

        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            tokens: Tensor = self.network(
                hidden_states=pack_latents(x),
                timestep=sigma,
                img_shapes=[[(1, height // 2, width // 2)]] * len(x),
                return_dict=False,
                **given,
            )[0]
            return tokens

        return unpack_latents(self.guided(call, latents, time, conditioning), height, width)

    def combined(self, without: Tensor, wanted: Tensor, scale: float) -> Tensor:
        found = super().combined(without, wanted, scale)
        return found * (wanted.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True))
