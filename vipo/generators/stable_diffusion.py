"""Stable Diffusion 1.x and 2.x (`UNet2DConditionModel`): classifier-free guidance, noise or v at timesteps."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from vipo.config.generator import GeneratorConfig
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, Prediction, checkpoint_location
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import clip_length, load_text_encoder, rows, with_negative
from vipo.generators.variants import refuse_channels, refuse_settings
from vipo.generators.words import SD

log = logging.getLogger(__name__)

NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "time_cond_proj_dim": "takes the guidance scale as an embedding (LCM)",
        "class_embed_type": "takes a class or another embedding beside the prompt",
        "num_class_embeds": "takes a class beside the prompt",
        "addition_embed_type": "takes sizes, a second text embedding or a picture beside the prompt (SDXL, Kandinsky)",
        "encoder_hid_dim_type": "projects another encoder's output (IP-Adapter, Kandinsky, DeepFloyd)",
        "encoder_hid_dim": "projects another encoder's output (DeepFloyd)",
        "dual_cross_attention": "attends to a picture beside the prompt (Versatile Diffusion)",
    }
)


class StableDiffusionGenerator(PipelineGenerator):
    """Stable Diffusion 1.x and 2.x; its scheduler says whether the network predicts noise or v.

    Attributes:
        needs: what a setting of the network asks for that the adapter does not give, by its name.
    """

    text_attention: ClassVar[TextAttention | None] = SD
    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    network_class: ClassVar[Any] = UNet2DConditionModel
    network_folder: ClassVar[str] = "unet"
    prediction: Prediction = "noise"
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({"encoder_hidden_states": "cross_attention_dim"})
    needs: ClassVar[Mapping[str, str]] = NEEDS

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self.use_picture_grid(network.config.in_channels)

    @classmethod
    def conditioning_lengths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        return {"encoder_hidden_states": clip_length(checkpoint_location(config, root), config)}

    @classmethod
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        super().check(config, root)
        default = GeneratorConfig.model_fields["max_sequence_length"].default
        if config.max_sequence_length != default:
            log.warning(
                "generator.max_sequence_length %d has no effect on family %r: its tokenizer has a limit of its own",
                config.max_sequence_length,
                config.family,
            )

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        refuse_settings(location, "unet", network, cls.needs)
        variants = "inpainting and image-editing checkpoints"
        refuse_channels(location, "unet", network, ("latent_channels", vae.latent_channels), variants)

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location = checkpoint_location(config, root)
        tokenizer, encoder = load_text_encoder(
            config,
            location,
            (CLIPTokenizer, "tokenizer"),
            (CLIPTextModel, "text_encoder"),
            [*texts, config.negative_prompt],
        )
        pipeline = StableDiffusionPipeline(
            vae=None,
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=None,
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            positive, _ = pipeline.encode_prompt(prompts, config.device, 1, do_classifier_free_guidance=False)
            return rows(encoder_hidden_states=positive)

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.guided(self._call, latents, time, conditioning)

    def _call(self, latents: Tensor, timestep: Tensor, given: Conditioning) -> Tensor:
        predicted: Tensor = self.network(sample=latents, timestep=timestep, return_dict=False, **given)[0]
        return predicted
