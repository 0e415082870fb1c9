"""FLUX.2 (`Flux2Transformer2DModel`): packed latents of 32 channels, a language model's layers as the prompt."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration, Qwen2Tokenizer, Qwen3ForCausalLM

from vipo.config.generator import GeneratorConfig
from vipo.generators import templates
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.packing import pack_latents, unpack_latents
from vipo.generators.parts import model_index
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.schedules import dynamic_shift, flow_settings
from vipo.generators.texts import in_batches, load_text_encoder, rows, with_negative
from vipo.generators.variants import refuse_channels
from vipo.generators.words import FLUX2_DEV, FLUX2_KLEIN

log = logging.getLogger(__name__)

_SEQUENCE = "encoder_hidden_states"


class _Flux2Generator(PipelineGenerator):
    """What FLUX.2 dev and klein share: all but the text encoder and the guidance."""

    network_class: ClassVar[Any] = Flux2Transformer2DModel
    autoencoders: ClassVar[Mapping[str, Any]] = MappingProxyType({"AutoencoderKLFlux2": AutoencoderKLFlux2})
    token_side: ClassVar[int | None] = 2
    longest_sequence: ClassVar[int | None] = 512
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({_SEQUENCE: "joint_attention_dim"})

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self.use_picture_grid(network.config.in_channels // 4, patch=2)
        _, height, width = self.latent_shape
        # Positions of time, row, column and word.
        self._image_ids = torch.cartesian_prod(
            torch.arange(1), torch.arange(height // 2), torch.arange(width // 2), torch.arange(1)
        ).to(self.device)

    @classmethod
    def to_stock(cls, latents: Tensor) -> Tensor:
        # Tokens' channels over rows and columns of tokens.
        height, width = latents.shape[-2:]
        return pack_latents(latents).mT.unflatten(2, (height // 2, width // 2))

    @classmethod
    def from_stock(cls, stepped: Tensor, shape: torch.Size) -> Tensor:
        return unpack_latents(stepped, *shape[-2:])

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        latent = ("latent_channels", vae.latent_channels)
        refuse_channels(location, "transformer", network, latent, "editing checkpoints", folded=4)
        if network.patch_size != 1:
            raise GeneratorError(f"{location}/transformer: patch_size {network.patch_size}; FLUX.2 has 1")

    def checkpoint_shift(self, location: Path | str) -> float | Callable[[int], float]:
        settings, (height, width) = flow_settings(location, self.config), self.grid
        if not settings.get("use_dynamic_shifting"):
            return super().checkpoint_shift(location)
        tokens = (height // 2) * (width // 2)
        return lambda steps: dynamic_shift(settings, compute_empirical_mu(tokens, steps))

    @classmethod
    @abstractmethod
    def load_pipeline(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> Any:
        """The stock pipeline with tokenizer and text encoder alone; warns of `texts` that are cut."""

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        pipeline = cls.load_pipeline(config, root, [*texts, config.negative_prompt])

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            sequences, _ = pipeline.encode_prompt(
                prompts, torch.device(config.device), max_sequence_length=config.max_sequence_length
            )
            return rows(**{_SEQUENCE: sequences})

        return (with_negative if cls.guides else in_batches)(encode, texts, config)

    def _call(self, latents: Tensor, sigma: Tensor, given: Conditioning, guidance: Tensor | None) -> Tensor:
        sequence, zeros = given[_SEQUENCE], torch.zeros(1, dtype=torch.int64, device=latents.device)
        words = torch.arange(sequence.shape[1], device=latents.device)
        tokens: Tensor = self.network(
            hidden_states=pack_latents(latents),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=sequence,
            txt_ids=torch.cartesian_prod(zeros, zeros, zeros, words),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return unpack_latents(tokens, *self.grid)

    def decode(self, latents: Tensor) -> Tensor:
        # The autoencoder normalises the four pixels of a token apart.
        normal, settings = self.vae.bn, self.vae.config
        std = (normal.running_var + settings.batch_norm_eps).sqrt()
        whole = unpack_latents(pack_latents(latents) * std + normal.running_mean, *self.grid)
        return (self.vae.decode(whole, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


class Flux2DevGenerator(_Flux2Generator):
    """FLUX.2-dev: read by Mistral 3, guidance embedded."""

    text_attention: ClassVar[TextAttention | None] = FLUX2_DEV
    pipeline_class: ClassVar[Any] = Flux2Pipeline
    guides: ClassVar[bool] = False

    @classmethod
    def load_pipeline(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> Any:
        tokenizer, encoder = load_text_encoder(
            config,
            checkpoint_location(config, root),
            (AutoTokenizer, "tokenizer"),
            (Mistral3ForConditionalGeneration, "text_encoder"),
            texts,
            config.max_sequence_length,
            templates.FLUX2_DEV,
        )
        return Flux2Pipeline(None, None, encoder, tokenizer, None)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        guidance = torch.full((len(latents),), self.config.guidance_scale, device=latents.device)
        return self._call(latents, time, conditioning, guidance)


class Flux2KleinGenerator(_Flux2Generator):
    """FLUX.2 klein: read by Qwen 3, guided away from the negative prompt where it is not distilled."""

    text_attention: ClassVar[TextAttention | None] = FLUX2_KLEIN
    pipeline_class: ClassVar[Any] = Flux2KleinPipeline

    _distilled = False

    @classmethod
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        super().check(config, root)
        if config.negative_prompt:
            raise GeneratorError(
                "generator.negative_prompt: FLUX.2 klein's stock pipeline is guided away from the empty prompt alone; "
                "leave it empty"
            )

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> Self:
        generator = super().load(config, root)
        generator._distilled = bool(model_index(checkpoint_location(config, root), config.revision).get("is_distilled"))
        if generator._distilled and config.guidance_scale > cls.neutral_guidance:
            log.warning(
                "generator.guidance_scale %s has no effect: guidance is distilled into this network (is_distilled); "
                "set it to 0",
                config.guidance_scale,
            )
        return generator

    @classmethod
    def load_pipeline(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> Any:
        tokenizer, encoder = load_text_encoder(
            config,
            checkpoint_location(config, root),
            (Qwen2Tokenizer, "tokenizer"),
            (Qwen3ForCausalLM, "text_encoder"),
            texts,
            config.max_sequence_length,
            templates.FLUX2_KLEIN,
        )
        return Flux2KleinPipeline(None, None, encoder, tokenizer, None)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            return self._call(x, sigma, given, None)

        return call(latents, time, conditioning) if self._distilled else self.guided(call, latents, time, conditioning)
