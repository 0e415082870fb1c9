"""FLUX-class generators (`FluxTransformer2DModel`): packed latents, embedded guidance, sigma as time."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.schedules import flow_shift
from vipo.generators.texts import load_text_encoder

log = logging.getLogger(__name__)

_LONGEST = 512


def pack_latents(latents: Tensor) -> Tensor:
    """``(B, C, H, W)`` to tokens ``(B, H/2 * W/2, 4 C)``: row-major 2x2 patches, features in (c, 2, 2) order."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents`, to ``(B, C, height, width)`` in latent pixels."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, features // 4, height, width)


def image_ids(height: int, width: int, device: torch.device | str) -> Tensor:
    """Rotary position ids of the tokens of a ``height x width`` latent: ``(H/2 * W/2, 3)`` float32."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    grid = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


class FluxGenerator(PipelineGenerator):
    """FLUX.1 and the demo generator."""

    pipeline_class: ClassVar[Any] = FluxPipeline
    network_class: ClassVar[Any] = FluxTransformer2DModel
    guides: ClassVar[bool] = False
    widths: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"encoder_hidden_states": "joint_attention_dim", "pooled_projections": "pooled_projection_dim"}
    )

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self._embeds_guidance = bool(network.config.guidance_embeds)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.check_size(2 * scale)
        self.latent_shape = (network.config.in_channels // 4, config.height // scale, config.width // scale)
        self._image_ids = image_ids(self.latent_shape[1], self.latent_shape[2], self.device)
        if not self._embeds_guidance and config.guidance_scale:
            log.warning(
                "generator.guidance_scale %s has no effect: this network embeds no guidance (guidance_embeds); set it "
                "to 0",
                config.guidance_scale,
            )

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> Self:
        generator = super().load(config, root)
        _, height, width = generator.latent_shape
        location = checkpoint_location(config, root)
        generator.flow_shift = flow_shift(location, config, (height // 2) * (width // 2))
        return generator

    @classmethod
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        super().check(config, root)
        # What it refuses does not depend on the number of tokens.
        flow_shift(checkpoint_location(config, root), config, tokens=1)
        if config.max_sequence_length > _LONGEST:
            raise GeneratorError(
                f"generator.max_sequence_length {config.max_sequence_length} is above {_LONGEST}, FLUX's limit"
            )

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        taken, made = network.in_channels, network.out_channels or network.in_channels
        if taken != made:
            raise GeneratorError(
                f"{location}/transformer: in_channels {taken} and out_channels {made}, as in FLUX Fill, Control and "
                "Depth, which take a picture as well; give a text-to-image checkpoint"
            )
        if network.patch_size != 1:
            raise GeneratorError(f"{location}/transformer: patch_size {network.patch_size}; FLUX.1 has 1")
        if taken != 4 * vae.latent_channels:
            raise GeneratorError(
                f"{location}/vae: latent_channels {vae.latent_channels}, but the transformer's in_channels {taken} "
                "stand for a quarter of them (2 x 2 latent pixels a token); give the autoencoder that belongs to it"
            )

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location = checkpoint_location(config, root)
        device = torch.device(config.device)
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
        encoded = []
        for text in texts:
            padded: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            clip_ids = clip_tokenizer(text, max_length=clip_tokenizer.model_max_length, **padded).input_ids
            t5_ids = t5_tokenizer(text, max_length=config.max_sequence_length, **padded).input_ids
            encoded.append(
                {
                    "pooled_projections": clip(clip_ids.to(device)).pooler_output[0].float().cpu(),
                    "encoder_hidden_states": t5(t5_ids.to(device))[0][0].float().cpu(),
                }
            )
        return encoded

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
