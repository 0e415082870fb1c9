"""Stable Diffusion XL (`UNet2DConditionModel`): two text encoders, a pooled embedding, and the picture's size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.parts import model_index, part_settings
from vipo.generators.stable_diffusion import NEEDS, StableDiffusionGenerator
from vipo.generators.texts import in_batches, load_text_encoder, negatives, rows, token_ids

_ADDED = "addition_embed_type"
_SIZES = 6


class StableDiffusionXLGenerator(StableDiffusionGenerator):
    """Stable Diffusion XL base; the refiner is another pipeline."""

    pipeline_class: ClassVar[Any] = StableDiffusionXLPipeline
    needs: ClassVar[Mapping[str, str]] = MappingProxyType({key: told for key, told in NEEDS.items() if key != _ADDED})

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        size = (config.height, config.width)
        # As the stock pipeline fills them in: the original size, where it was cropped, the size that is wanted.
        self._sizes = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=self.device)

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        super().check_parts(location, network, vae)
        if (kind := getattr(network, _ADDED, None)) != "text_time":
            raise GeneratorError(
                f"{location}/unet: {_ADDED} {kind!r}; Stable Diffusion XL has 'text_time'. Give such a checkpoint"
            )
        if vae.latents_mean is not None:
            raise GeneratorError(
                f"{location}/vae: latents_mean is set, as in Playground 2.5, whose noise levels are not those of a "
                "variance-preserving diffusion; give a Stable Diffusion XL checkpoint"
            )

    @classmethod
    def conditioning_widths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        location = checkpoint_location(config, root)
        settings = part_settings(cls.network_class, location, cls.network_folder, config)
        pooled = settings.projection_class_embeddings_input_dim - _SIZES * settings.addition_time_embed_dim
        return {**super().conditioning_widths(config, root), "text_embeds": pooled}

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location, read = checkpoint_location(config, root), [*texts, config.negative_prompt]
        encoders = [
            load_text_encoder(config, location, (CLIPTokenizer, f"tokenizer{end}"), (kind, f"text_encoder{end}"), read)
            for end, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection))
        ]

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            found = []
            for tokenizer, model in encoders:
                ids = token_ids(tokenizer, prompts, tokenizer.model_max_length, config.device)
                found.append(model(ids, output_hidden_states=True))
            sequence = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
            return rows(encoder_hidden_states=sequence, text_embeds=found[-1].text_embeds)

        [negative] = encode([config.negative_prompt])
        index = model_index(location, config.revision)
        if not config.negative_prompt and index.get("force_zeros_for_empty_prompt", True):
            negative = {name: torch.zeros_like(value) for name, value in negative.items()}
        guided = negatives(negative)
        return [row | guided for row in in_batches(encode, texts, config)]

    def _call(self, latents: Tensor, timestep: Tensor, given: Conditioning) -> Tensor:
        added = {"text_embeds": given["text_embeds"], "time_ids": self._sizes.expand(len(latents), _SIZES)}
        predicted: Tensor = self.network(
            sample=latents,
            timestep=timestep,
            encoder_hidden_states=given["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return predicted
