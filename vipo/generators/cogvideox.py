"""CogVideoX text-to-video (`CogVideoXTransformer3DModel`): v over training timesteps, frames before channels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from vipo.config.generator import GeneratorConfig
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, Prediction, checkpoint_location
from vipo.generators.frames import configured_frame_groups
from vipo.generators.parts import part_settings
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import load_text_encoder, rows, token_ids, with_negative
from vipo.generators.variants import refuse_channels, refuse_settings
from vipo.generators.words import COGVIDEOX

_NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "ofs_embed_dim": "takes a second embedding (CogVideoX 1.5 image-to-video)",
        "use_learned_positional_embeddings": "takes a picture as well (image-to-video)",
    }
)
_SEQUENCE = "encoder_hidden_states"


class CogVideoXGenerator(PipelineGenerator):
    """CogVideoX 2B, 5B and 1.5.

    The network of 1.5 takes latent frames by twos: one more stands before those that are decoded, at the first frame.
    """

    frame_rate: ClassVar[int | None] = 8
    text_attention: ClassVar[TextAttention | None] = COGVIDEOX
    pipeline_class: ClassVar[Any] = CogVideoXPipeline
    network_class: ClassVar[Any] = CogVideoXTransformer3DModel
    autoencoders: ClassVar[Mapping[str, Any]] = MappingProxyType({"AutoencoderKLCogVideoX": AutoencoderKLCogVideoX})
    prediction: Prediction = "v"
    ddim: ClassVar[Any] = CogVideoXDDIMScheduler
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({_SEQUENCE: "text_embed_dim"})

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        space, factor = 2 ** (len(vae.config.block_out_channels) - 1), int(vae.config.temporal_compression_ratio)
        self.check_size(space * network.config.patch_size)
        self.frame_groups = configured_frame_groups(config, factor)
        frames = len(self.frame_groups)
        if frames % 2 == 0:
            # Its autoencoder decodes latent frames by twos, the first one with those that are left over.
            raise GeneratorError(
                f"generator.frames {config.frames} is not of the form 1 + {2 * factor} k (odd latent frames)"
            )
        self._before = -frames % (network.config.patch_size_t or 1)
        self.frame_groups = (*self.frame_groups[:1] * self._before, *self.frame_groups)
        frames += self._before
        self.latent_shape = (network.config.in_channels, frames, config.height // space, config.width // space)
        self._rotary = None
        if network.config.use_rotary_positional_embeddings:
            self._rotary = CogVideoXPipeline(None, None, vae, network, None)._prepare_rotary_positional_embeddings(
                config.height, config.width, frames, self.device
            )

    @classmethod
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        super().check(config, root)
        settings = part_settings(cls.network_class, checkpoint_location(config, root), cls.network_folder, config)
        if config.max_sequence_length != settings.max_text_seq_length:
            raise GeneratorError(
                f"generator.max_sequence_length {config.max_sequence_length}: the network takes "
                f"{settings.max_text_seq_length} text tokens (max_text_seq_length); set it to that"
            )

    @classmethod
    def to_stock(cls, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)

    @classmethod
    def from_stock(cls, stepped: Tensor, shape: torch.Size) -> Tensor:
        return stepped.transpose(1, 2)

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        refuse_settings(location, "transformer", network, _NEEDS)
        latent = ("latent_channels", vae.latent_channels)
        refuse_channels(location, "transformer", network, latent, "image-to-video and control checkpoints")

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        length = config.max_sequence_length
        tokenizer, encoder = load_text_encoder(
            config,
            checkpoint_location(config, root),
            (T5TokenizerFast, "tokenizer"),
            (T5EncoderModel, "text_encoder"),
            [*texts, config.negative_prompt],
            length,
        )

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            return rows(**{_SEQUENCE: encoder(token_ids(tokenizer, prompts, length, config.device))[0]})

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, timestep: Tensor, given: Conditioning) -> Tensor:
            predicted: Tensor = self.network(
                hidden_states=x.transpose(1, 2),
                timestep=timestep,
                image_rotary_emb=self._rotary,
                return_dict=False,
                **given,
            )[0]
            return predicted.transpose(1, 2)

        return self.guided(call, latents, time, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :, self._before :]).transpose(1, 2)
