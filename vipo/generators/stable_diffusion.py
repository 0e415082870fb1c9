"""Stable Diffusion 1.x (`UNet2DConditionModel`): classifier-free guidance, noise prediction over training timesteps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from vipo.config.models import GeneratorConfig
from vipo.generators.base import NEGATIVE, Conditioning, GeneratorError, checkpoint_location
from vipo.generators.pipeline import PipelineGenerator, load_part, load_tokenizer


class StableDiffusionGenerator(PipelineGenerator):
    """Stable Diffusion 1.x, and 2.x checkpoints that predict noise."""

    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    network_class: ClassVar[Any] = UNet2DConditionModel
    network_folder: ClassVar[str] = "unet"
    prediction: ClassVar[Literal["velocity", "noise"]] = "noise"

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        channels = network.config.in_channels
        if channels != network.config.out_channels:
            raise GeneratorError(
                f"{config.path}: the network takes {channels} channels and predicts {network.config.out_channels}, as "
                "in inpainting checkpoints; give a text-to-image one"
            )
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.check_size(scale)
        self.latent_shape = (channels, config.height // scale, config.width // scale)

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> Self:
        location = checkpoint_location(config, root)
        scheduler = load_part(DDIMScheduler.from_pretrained, location, "scheduler", config, weights=False)
        if (kind := scheduler.config.prediction_type) != "epsilon":
            raise GeneratorError(
                f"{location}/scheduler: prediction_type {kind!r}; vipo trains networks that predict noise ('epsilon')"
            )
        generator = super().load(config, root)
        generator.alphas_cumprod = scheduler.alphas_cumprod
        return generator

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location = checkpoint_location(config, root)
        tokenizer = load_tokenizer(CLIPTokenizer, location, "tokenizer", config)
        encoder = load_part(CLIPTextModel.from_pretrained, location, "text_encoder", config)
        pipeline = StableDiffusionPipeline(
            vae=None,
            text_encoder=encoder.to(config.device).eval(),
            tokenizer=tokenizer,
            unet=None,
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

        def encode(text: str) -> Tensor:
            positive, _ = pipeline.encode_prompt(text, config.device, 1, do_classifier_free_guidance=False)
            embedding: Tensor = positive[0].float().cpu()
            return embedding

        negative = encode(config.negative_prompt)
        name = "encoder_hidden_states"
        return [{name: encode(text), NEGATIVE + name: negative} for text in texts]

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, timestep: Tensor, given: Conditioning) -> Tensor:
            noise: Tensor = self.network(sample=x, timestep=timestep, return_dict=False, **given)[0]
            return noise

        return self.guided(call, latents, time, conditioning)
