"""Sana (`SanaTransformer2DModel`): an autoencoder of 32 x 32 pixels, prompts behind an instruction of the authors."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, Gemma2Model

from vipo.config.generator import GeneratorConfig
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, checkpoint_location
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import in_batches, load_text_encoder, negatives, rows
from vipo.generators.variants import refuse_channels, refuse_settings
from vipo.generators.words import SANA

_NEEDS: Mapping[str, str] = MappingProxyType({"guidance_embeds": "takes the guidance scale as an embedding (Sprint)"})
_NAMES = ("encoder_hidden_states", "encoder_attention_mask")


class SanaGenerator(PipelineGenerator):
    """Sana at the size that is asked for: pictures are not made at a near trained size and cropped."""

    text_attention: ClassVar[TextAttention | None] = SANA
    pipeline_class: ClassVar[Any] = SanaPipeline
    network_class: ClassVar[Any] = SanaTransformer2DModel
    autoencoders: ClassVar[Mapping[str, Any]] = MappingProxyType({"AutoencoderDC": AutoencoderDC})
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({_NAMES[0]: "caption_channels"})
    masks: ClassVar[tuple[str, ...]] = (_NAMES[1],)

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        scale = 2 ** (len(vae.config.encoder_block_out_channels) - 1)
        self.check_size(scale * network.config.patch_size)
        self._time_scale = 1000 * network.config.timestep_scale
        self.latent_shape = (network.config.in_channels, config.height // scale, config.width // scale)

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        refuse_settings(location, "transformer", network, _NEEDS)
        latent = ("latent_channels", vae.latent_channels)
        refuse_channels(location, "transformer", network, latent, "checkpoints that predict a variance as well")

    @classmethod
    def stock_arguments(cls, config: GeneratorConfig) -> Mapping[str, object]:
        return {"use_resolution_binning": False}

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        length = config.max_sequence_length
        tokenizer, encoder = load_text_encoder(
            config,
            checkpoint_location(config, root),
            (AutoTokenizer, "tokenizer"),
            (Gemma2Model, "text_encoder"),
            [*texts, config.negative_prompt],
            length,
        )
        pipeline = SanaPipeline(tokenizer, encoder, None, None, None)
        # The stock call's own default: it stands before every prompt but the negative one.
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default

        def encode(prompts: list[str], before: list[str] | None = instruction) -> list[dict[str, Tensor]]:
            found = pipeline.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                device=torch.device(config.device),
                max_sequence_length=length,
                complex_human_instruction=before,
            )
            return rows(**dict(zip(_NAMES, found[:2], strict=True)))

        negative = negatives(encode([config.negative_prompt], None)[0])
        return [row | negative for row in in_batches(encode, texts, config)]

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            timestep = self._time_scale * sigma
            velocity: Tensor = self.network(hidden_states=x, timestep=timestep, return_dict=False, **given)[0]
            return velocity

        return self.guided(call, latents, time, conditioning)
