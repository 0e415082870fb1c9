"""FLUX-class generators (`FluxTransformer2DModel`): packed latents, embedded guidance, sigma as time."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from vipo.config.generator import GeneratorConfig
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.packing import pack_latents, unpack_latents
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import in_batches, load_text_encoder, rows, token_ids
from vipo.generators.variants import refuse_channels
from vipo.generators.words import FLUX

log = logging.getLogger(__name__)


def image_ids(height: int, width: int, device: torch.device | str) -> Tensor:
    """Rotary position ids of the tokens of a ``height x width`` latent: ``(H/2 * W/2, 3)`` float32."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    grid = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


class FluxGenerator(PipelineGenerator):
    """FLUX.1 and the demo generator."""

    text_attention: ClassVar[TextAttention | None] = FLUX
    pipeline_class: ClassVar[Any] = FluxPipeline
    network_class: ClassVar[Any] = FluxTransformer2DModel
    guides: ClassVar[bool] = False
    token_side: ClassVar[int | None] = 2
    longest_sequence: ClassVar[int | None] = 512
    widths: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"encoder_hidden_states": "joint_attention_dim", "pooled_projections": "pooled_projection_dim"}
    )

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self._embeds_guidance = bool(network.config.guidance_embeds)
        self.use_picture_grid(network.config.in_channels // 4, patch=2)
        self._image_ids = image_ids(self.latent_shape[1], self.latent_shape[2], self.device)
        if not self._embeds_guidance and config.guidance_scale:
            log.warning(
                "generator.guidance_scale %s has no effect: this network embeds no guidance (guidance_embeds); set it "
                "to 0",
                config.guidance_scale,
            )

    @classmethod
    def to_stock(cls, latents: Tensor) -> Tensor:
        return pack_latents(latents)

    @classmethod
    def from_stock(cls, stepped: Tensor, shape: torch.Size) -> Tensor:
        return unpack_latents(stepped, *shape[-2:])

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        variants = "FLUX Fill, Control and Depth, which take a picture as well"
        refuse_channels(location, "transformer", network, ("latent_channels", vae.latent_channels), variants, folded=4)
        if network.patch_size != 1:
            raise GeneratorError(f"{location}/transformer: patch_size {network.patch_size}; FLUX.1 has 1")

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location = checkpoint_location(config, root)
        clip_tokenizer, clip = load_text_encoder(
            config, location, (CLIPTokenizer, "tokenizer"), (CLIPTextModel, "text_encoder"), texts
        )
        t5_tokenizer, t5 = load_text_encoder(
            config,
            location,
            (T5TokenizerFast, "tokenizer_2"),
            (T5EncoderModel, "text_encoder_2"),
            texts,
            config.max_sequence_length,
        )

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            clip_ids = token_ids(clip_tokenizer, prompts, clip_tokenizer.model_max_length, config.device)
            t5_ids = token_ids(t5_tokenizer, prompts, config.max_sequence_length, config.device)
            return rows(pooled_projections=clip(clip_ids).pooler_output, encoder_hidden_states=t5(t5_ids)[0])

        return in_batches(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        sequence = conditioning["encoder_hidden_states"]
        guidance = None
        if self._embeds_guidance:
            guidance = torch.full((len(latents),), self.config.guidance_scale, device=latents.device)
        tokens = self.network(
            hidden_states=pack_latents(latents),
            timestep=time,
            guidance=guidance,
            pooled_projections=conditioning["pooled_projections"],
            encoder_hidden_states=sequence,
            txt_ids=torch.zeros(sequence.shape[1], 3, device=latents.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return unpack_latents(tokens, self.latent_shape[1], self.latent_shape[2])
