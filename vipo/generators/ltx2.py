"""LTX-2 (`LTX2VideoTransformer3DModel`): its video alone, without sound, and without attention to any."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLLTX2Video, LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from torch import Tensor
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

from vipo.config.generator import GeneratorConfig
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.frames import configured_frame_groups
from vipo.generators.packing import flat_tokens, from_flat_tokens
from vipo.generators.parts import load_part, part_settings
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import load_text_encoder, rows, with_negative
from vipo.generators.variants import refuse_channels
from vipo.generators.words import LTX2

_SEQUENCE = "encoder_hidden_states"
# The stock pipeline takes no others.
_SIDE = 32


class LTX2Generator(PipelineGenerator):
    """LTX-2 and 2.3, text to video.

    The network's halves, of picture and sound, attend to each other. Here they do not (`isolate_modalities`), as in the
    call by which the stock pipeline guides away from it: the picture's half is then a network by itself, which the
    sound's, given the least sound there is, does not reach.
    """

    frame_rate: ClassVar[int | None] = 24
    text_attention: ClassVar[TextAttention | None] = LTX2
    pipeline_class: ClassVar[Any] = LTX2Pipeline
    network_class: ClassVar[Any] = LTX2VideoTransformer3DModel
    autoencoders: ClassVar[Mapping[str, Any]] = MappingProxyType({"AutoencoderKLLTX2Video": AutoencoderKLLTX2Video})
    folded: ClassVar[bool] = False
    token_side: ClassVar[int | None] = 1
    # What is of the sound, and of the attention between it and the picture.
    untrained: ClassVar[str] = r"(.+\.)?(audio_|av_cross_attn_|video_a2v_|video_to_audio_).+"
    stock_forced: ClassVar[Mapping[str, object]] = MappingProxyType({"isolate_modalities": True})

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        space = vae.spatial_compression_ratio
        self.check_size(math.lcm(space, _SIDE))
        self.frame_groups = configured_frame_groups(config, vae.temporal_compression_ratio)
        settings, frames = network.config, len(self.frame_groups)
        self.latent_shape = (settings.in_channels, frames, config.height // space, config.width // space)
        read = settings.caption_channels if settings.use_prompt_embeddings else settings.audio_cross_attention_dim
        self._sound = {"audio_hidden_states": settings.audio_in_channels, "audio_encoder_hidden_states": read}

    @classmethod
    def stock_arguments(cls, config: GeneratorConfig) -> Mapping[str, object]:
        # Guidance by the negative prompt alone, of the sound as well: its own would turn that of the picture on.
        return {
            "frame_rate": float(cls.frame_rate or 0),
            "audio_guidance_scale": config.guidance_scale,
            "guidance_rescale": 0.0,
            "audio_guidance_rescale": 0.0,
            "stg_scale": 0.0,
            "audio_stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_modality_scale": 1.0,
        }

    @classmethod
    def _check_settings(
        cls, config: GeneratorConfig, root: Path, location: Path | str, index: Mapping[str, Any]
    ) -> None:
        super()._check_settings(config, root, location, index)
        settings = part_settings(LTX2TextConnectors, location, "connectors", config)
        registers = settings.video_connector_num_learnable_registers
        if type(registers) is not int or registers < 1:
            raise GeneratorError(
                f"{location}/connectors: video_connector_num_learnable_registers {registers!r}: what a prompt leaves "
                "over would be read as words; give LTX-2's own connectors"
            )
        if config.max_sequence_length % registers:
            raise GeneratorError(
                f"generator.max_sequence_length {config.max_sequence_length} is not a multiple of {registers}, the "
                "registers that fill up what a prompt leaves over"
            )

    @classmethod
    def check_index(cls, location: Path | str, index: Mapping[str, Any]) -> None:
        known = Gemma3ForConditionalGeneration.__name__
        if (found := index.get("text_encoder", [None, known])[1]) != known:
            raise GeneratorError(
                f"{location}/model_index.json: text_encoder {found!r}; family 'ltx2' holds LTX-2 and 2.3, whose "
                f"prompts {known} reads, and not LTX-2.5"
            )

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        if (network.patch_size, network.patch_size_t) != (1, 1):
            raise GeneratorError(
                f"{location}/transformer: patch_size {network.patch_size}, patch_size_t {network.patch_size_t}; LTX-2 "
                "has 1 and 1"
            )
        latent = ("latent_channels", vae.latent_channels)
        refuse_channels(location, "transformer", network, latent, "checkpoints that take a condition")
        inject = vae.decoder_inject_noise
        if inject is True or (inject and any(inject)):
            raise GeneratorError(
                f"{location}/vae: decoder_inject_noise {inject}: it draws noise while it decodes, so that the same "
                "latents are other pictures each time"
            )

    @classmethod
    def conditioning_widths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        settings = part_settings(cls.network_class, checkpoint_location(config, root), cls.network_folder, config)
        read = settings.caption_channels if settings.use_prompt_embeddings else settings.cross_attention_dim
        return {_SEQUENCE: read}

    @classmethod
    def to_stock(cls, latents: Tensor) -> Tensor:
        return flat_tokens(latents)

    @classmethod
    def from_stock(cls, stepped: Tensor, shape: torch.Size) -> Tensor:
        return from_flat_tokens(stepped, shape)

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location, length = checkpoint_location(config, root), config.max_sequence_length
        tokenizer, encoder = load_text_encoder(
            config,
            location,
            (AutoTokenizer, "tokenizer"),
            (Gemma3ForConditionalGeneration, "text_encoder"),
            [*texts, config.negative_prompt],
            length,
        )
        connectors = load_part(
            LTX2TextConnectors.from_pretrained, location, "connectors", config, dtype=encoder.dtype
        ).to(config.device)
        others = dict.fromkeys(("scheduler", "vae", "audio_vae", "transformer", "vocoder"))
        # Without its head, which would give each token the probability of every other.
        pipeline = LTX2Pipeline(text_encoder=encoder.model, tokenizer=tokenizer, connectors=connectors.eval(), **others)

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            states, mask, *_ = pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=length
            )
            # Words first, then registers: nothing of it is masked.
            return rows(**{_SEQUENCE: connectors(states, mask, padding_side=tokenizer.padding_side)[0]})

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        frames, height, width = self.latent_shape[1:]

        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            sound = {name: x.new_zeros(len(x), 1, channels) for name, channels in self._sound.items()}
            velocity = self.network(
                hidden_states=self.to_stock(x),
                timestep=1000 * sigma,
                sigma=1000 * sigma,
                num_frames=frames,
                height=height,
                width=width,
                fps=self.frame_rate,
                audio_num_frames=1,
                return_dict=False,
                **sound,
                **self.stock_forced,
                **given,
            )[0]
            return self.from_stock(velocity, x.shape)

        return self.guided(call, latents, time, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        settings = self.vae.config
        mean, std = (each.view(-1, 1, 1, 1) for each in (self.vae.latents_mean, self.vae.latents_std))
        scaled = latents * std / settings.scaling_factor + mean
        # Where it takes a noise level, the stock pipeline's is none.
        level = latents.new_zeros(len(latents)) if settings.timestep_conditioning else None
        video = self.vae.decode(scaled, level, return_dict=False)[0].transpose(1, 2)
        return (video.float() / 2 + 0.5).clamp(0, 1)
