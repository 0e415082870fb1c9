"""Z-Image (`ZImageTransformer2DModel`): lists of pictures and prompts of their own lengths, time from noise to data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3Model

from vipo.config.generator import GeneratorConfig
from vipo.generators import templates
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.parts import model_index, part_class
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import load_text_encoder, padded, with_negative
from vipo.generators.variants import refuse_channels, refuse_settings
from vipo.generators.words import Z_IMAGE

_ENCODERS: Mapping[str, Any] = MappingProxyType({"Qwen3Model": Qwen3Model, "Qwen3ForCausalLM": Qwen3ForCausalLM})
_NEEDS: Mapping[str, str] = MappingProxyType({"siglip_feat_dim": "takes pictures as well (Z-Image Omni)"})
_SEQUENCE = "cap_feats"


class ZImageGenerator(PipelineGenerator):
    """Z-Image; its guidance scale counts from 0, ``p + scale (p - n)``."""

    text_attention: ClassVar[TextAttention | None] = Z_IMAGE
    pipeline_class: ClassVar[Any] = ZImagePipeline
    network_class: ClassVar[Any] = ZImageTransformer2DModel
    neutral_guidance: ClassVar[float] = 0.0
    token_side: ClassVar[int | None] = 2
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({_SEQUENCE: "cap_feat_dim"})
    masks: ClassVar[tuple[str, ...]] = (f"{_SEQUENCE}_mask",)

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self._reads_lengths = True
        self.use_picture_grid(network.config.in_channels, patch=2)
        words, *sides = network.config.axes_lens
        filled = config.max_sequence_length + -config.max_sequence_length % Z_IMAGE.multiple
        for key, wanted, known in (
            ("max_sequence_length", filled + 2, words),
            ("height", self.grid[0] // 2, sides[0]),
            ("width", self.grid[1] // 2, sides[1]),
        ):
            if wanted > known:
                raise GeneratorError(
                    f"generator.{key} {getattr(config, key)} needs {wanted} positions, the network has {known} "
                    "(axes_lens); lower it"
                )

    def read_no_values(self, *, one_time: bool) -> None:
        self._reads_lengths = False

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        refuse_settings(location, "transformer", network, _NEEDS)
        latent = ("latent_channels", vae.latent_channels)
        refuse_channels(location, "transformer", network, latent, "editing checkpoints")
        if (tuple(network.all_patch_size), tuple(network.all_f_patch_size)) != ((2,), (1,)):
            raise GeneratorError(
                f"{location}/transformer: all_patch_size {network.all_patch_size}, all_f_patch_size "
                f"{network.all_f_patch_size}; Z-Image has [2] and [1]"
            )

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location, length = checkpoint_location(config, root), config.max_sequence_length
        kind = part_class(location, model_index(location, config.revision), "text_encoder", _ENCODERS)
        tokenizer, encoder = load_text_encoder(
            config,
            location,
            (Qwen2Tokenizer, "tokenizer"),
            (kind, "text_encoder"),
            [*texts, config.negative_prompt],
            length,
            templates.Z_IMAGE,
        )
        pipeline = ZImagePipeline(None, None, encoder, tokenizer, None)

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            # Into whose list the pipeline writes.
            found, _ = pipeline.encode_prompt(
                prompts, config.device, do_classifier_free_guidance=False, max_sequence_length=length
            )
            return [padded(one, length, _SEQUENCE) for one in found]

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            # Positions of the picture follow the prompt's length, so that it has to be known here.
            mask = given[f"{_SEQUENCE}_mask"]
            lengths = mask.sum(dim=1).long().tolist() if self._reads_lengths else [mask.shape[1]] * len(mask)
            prompts = [rows[:length] for rows, length in zip(given[_SEQUENCE], lengths, strict=True)]
            made = self.network(list(x.unsqueeze(2)), 1 - sigma, prompts, return_dict=False)[0]
            return -torch.stack(made).squeeze(2)

        return self.guided(call, latents, time, conditioning)
