"""Stable Diffusion 3 and 3.5 (`SD3Transformer2DModel`): three text encoders, the last of which may be left out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from vipo.config.generator import GeneratorConfig
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.parts import model_index, part_settings
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import clip_length, load_text_encoder, rows, token_ids, with_negative
from vipo.generators.variants import refuse_channels
from vipo.generators.words import SD3


class StableDiffusion3Generator(PipelineGenerator):
    """Stable Diffusion 3 and 3.5, medium and large, with T5 or without; skip-layer guidance is not used."""

    text_attention: ClassVar[TextAttention | None] = SD3
    pipeline_class: ClassVar[Any] = StableDiffusion3Pipeline
    network_class: ClassVar[Any] = SD3Transformer2DModel
    token_side: ClassVar[int | None] = 2
    longest_sequence: ClassVar[int | None] = 512
    widths: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"encoder_hidden_states": "joint_attention_dim", "pooled_projections": "pooled_projection_dim"}
    )

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self.use_picture_grid(network.config.in_channels, network.config.patch_size)
        known = network.config.pos_embed_max_size * network.config.patch_size
        for key, positions in zip(("height", "width"), self.grid, strict=True):
            if positions > known:
                pixels = getattr(config, key) * known // positions
                raise GeneratorError(
                    f"generator.{key} {getattr(config, key)}: the network has positions for {pixels} pixels a side "
                    "(pos_embed_max_size); lower it"
                )

    @classmethod
    def conditioning_lengths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        clip = clip_length(checkpoint_location(config, root), config)
        return {"encoder_hidden_states": clip + config.max_sequence_length}

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        variants = "inpainting and control checkpoints"
        refuse_channels(location, "transformer", network, ("latent_channels", vae.latent_channels), variants)
        if network.patch_size != cls.token_side:
            raise GeneratorError(
                f"{location}/transformer: patch_size {network.patch_size}; Stable Diffusion 3 has {cls.token_side}"
            )

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location, read = checkpoint_location(config, root), [*texts, config.negative_prompt]
        clips = [
            load_text_encoder(
                config,
                location,
                (CLIPTokenizer, f"tokenizer{end}"),
                (CLIPTextModelWithProjection, f"text_encoder{end}"),
                read,
            )
            for end in ("", "_2")
        ]
        longest, length = clips[0][0].model_max_length, config.max_sequence_length
        settings = part_settings(cls.network_class, location, cls.network_folder, config)
        t5: tuple[Any, Any] | None = None
        if any(model_index(location, config.revision).get("text_encoder_3") or ()):
            words, reader = (T5TokenizerFast, "tokenizer_3"), (T5EncoderModel, "text_encoder_3")
            t5 = load_text_encoder(config, location, words, reader, read, length)

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            found = [
                model(token_ids(tokenizer, prompts, longest, config.device), output_hidden_states=True)
                for tokenizer, model in clips
            ]
            clip = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
            if t5 is None:
                sequence = clip.new_zeros(len(prompts), length, settings.joint_attention_dim)
            else:
                sequence = t5[1](token_ids(t5[0], prompts, length, config.device))[0]
            clip = functional.pad(clip, (0, sequence.shape[-1] - clip.shape[-1]))
            return rows(
                encoder_hidden_states=torch.cat([clip, sequence], dim=1),
                pooled_projections=torch.cat([each.text_embeds for each in found], dim=-1),
            )

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            velocity: Tensor = self.network(hidden_states=x, timestep=1000 * sigma, return_dict=False, **given)[0]
            return velocity

        return self.guided(call, latents, time, conditioning)
