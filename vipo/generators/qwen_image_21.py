"""Qwen-Image 2.1 (`QwenImage21Transformer2DModel`): text and picture as one sequence, decoded with transparency."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from vipo.config.generator import GeneratorConfig
from vipo.generators import templates
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.packing import flat_tokens, from_flat_tokens
from vipo.generators.qwen_image import QwenGenerator
from vipo.generators.qwen_image_21_forward import as_text_to_picture
from vipo.generators.texts import load_text_encoder, padded_rows, shown, with_negative
from vipo.generators.variants import refuse_channels
from vipo.generators.words import QWEN_IMAGE_21

log = logging.getLogger(__name__)

_SEQUENCE = "encoder_hidden_states"
# Pixels a side of a latent pixel, as the stock pipeline has it whatever the autoencoder says; it takes pairs of them.
_SCALE = 16


class QwenImage21Generator(QwenGenerator):
    """Qwen-Image 2.1, text to picture; where its pictures are transparent, they are shown on white."""

    text_attention: ClassVar[TextAttention | None] = QWEN_IMAGE_21
    prompt_tokenizers: ClassVar[Sequence[str] | None] = ("processor",)
    pipeline_class: ClassVar[Any] = QwenImage21Pipeline
    network_class: ClassVar[Any] = QwenImage21Transformer2DModel
    autoencoders: ClassVar[Mapping[str, Any]] = MappingProxyType({"AutoencoderKLQwenImage21": AutoencoderKLQwenImage21})
    decoded_channels: ClassVar[int] = 4
    stock_joins_prompts: ClassVar[bool] = False
    token_side: ClassVar[int | None] = 1
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({_SEQUENCE: "context_in_dim"})
    masks: ClassVar[tuple[str, ...]] = (f"{_SEQUENCE}_mask",)

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self.check_size(2 * _SCALE)
        self.latent_shape = (network.config.in_channels, config.height // _SCALE, config.width // _SCALE)

    @classmethod
    def prepared(cls, network: Any) -> Any:
        return as_text_to_picture(network)

    @classmethod
    def to_stock(cls, latents: Tensor) -> Tensor:
        return flat_tokens(latents)

    @classmethod
    def from_stock(cls, stepped: Tensor, shape: torch.Size) -> Tensor:
        return from_flat_tokens(stepped, shape)

    @classmethod
    def opaque(cls, pictures: Tensor) -> Tensor:
        colours, alpha = pictures.split([3, 1], dim=1)
        return colours * alpha + (1 - alpha)

    @classmethod
    def check_index(cls, location: Path | str, index: Mapping[str, Any]) -> None:
        own = index.get("sample_sigmas")
        if own is not None and not (isinstance(own, list) and all(isinstance(each, int | float) for each in own)):
            raise GeneratorError(
                f"{location}/model_index.json: sample_sigmas {own!a:.80} is no list of noise levels; set it to null, "
                "or copy or download generator.path again"
            )
        if own:
            log.warning(
                "%s/model_index.json: sample_sigmas: the stock pipeline goes through these %d noise levels whatever it "
                "is asked for; vipo's are those of sampling.steps and sampling.shift",
                location,
                len(own),
            )

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        latent = ("z_dim", vae.z_dim)
        refuse_channels(location, "transformer", network, latent, "checkpoints that take a condition")
        if network.patch_size != 1:
            raise GeneratorError(f"{location}/transformer: patch_size {network.patch_size}; Qwen-Image 2.1 has 1")
        if network.causal_condition is not True:
            raise GeneratorError(
                f"{location}/transformer: causal_condition {network.causal_condition!r}: its words would be modulated "
                "by the picture's noise; Qwen-Image 2.1 has true"
            )
        if (scale := 2 ** (len(vae.dim_mult) - 1)) != _SCALE:
            raise GeneratorError(
                f"{location}/vae: dim_mult {vae.dim_mult}: a latent pixel has {scale} pixels a side; Qwen-Image 2.1 "
                f"has {_SCALE}"
            )

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location, length = checkpoint_location(config, root), config.max_sequence_length
        processor, template, dropped = templates.qwen_image_21(location, config)
        for key, text in (*(("prompt", text) for text in texts), ("generator.negative_prompt", config.negative_prompt)):
            _check_prompt(key, text, processor, template(None, text), dropped, config)
        _, encoder = load_text_encoder(
            config,
            location,
            (Qwen2Tokenizer, "processor"),
            (Qwen3VLForConditionalGeneration, "text_encoder"),
            [*texts, config.negative_prompt],
            length + dropped,
            template,
        )
        pipeline = QwenImage21Pipeline(None, None, encoder, processor, None)

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            found, mask, _ = pipeline.encode_prompt(prompts, device=torch.device(config.device))
            return padded_rows(found, mask, length, _SEQUENCE)

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            velocity: Tensor = self.network(latents=x, sigma=sigma, **given)[0]
            return velocity

        return self.guided(call, latents, time, conditioning)


def _check_prompt(key: str, text: str, processor: Any, read: str, dropped: int, config: GeneratorConfig) -> None:
    """Refuse what the stock pipeline would read otherwise: it cuts nothing off, and puts pictures where they stand."""
    ids = processor.tokenizer(read).input_ids
    if marks := {processor.image_token_id, processor.video_token_id} & set(ids):
        named = ", ".join(map(str, processor.tokenizer.convert_ids_to_tokens(sorted(marks))))
        raise GeneratorError(f"{key} {shown(text)}: {named} stands for a picture or a video, of which there is none")
    if (needed := len(ids) - dropped) > config.max_sequence_length:
        other = "shorten it" if key.startswith("generator.") else "leave such out (prompts.filters.max_tokens)"
        raise GeneratorError(
            f"generator.max_sequence_length {config.max_sequence_length}: {key} {shown(text)} has {needed} tokens with "
            f"what stands around it, and Qwen-Image 2.1 reads prompts whole; raise it, or {other}"
        )
