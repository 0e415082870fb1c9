"""FLUX-class generators (`FluxTransformer2DModel`): packed latents, embedded guidance, sigma as time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from vipo.config.models import GeneratorConfig
from vipo.generators.base import Conditioning, checkpoint_location
from vipo.generators.pipeline import PipelineGenerator, load_part, load_tokenizer


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

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self._embeds_guidance = bool(network.config.guidance_embeds)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.check_size(2 * scale)
        self.latent_shape = (network.config.in_channels // 4, config.height // scale, config.width // scale)
        self._image_ids = image_ids(self.latent_shape[1], self.latent_shape[2], self.device)

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location = checkpoint_location(config, root)
        device = torch.device(config.device)
        clip_tokenizer = load_tokenizer(CLIPTokenizer, location, "tokenizer", config)
        t5_tokenizer = load_tokenizer(T5TokenizerFast, location, "tokenizer_2", config)
        clip = load_part(CLIPTextModel.from_pretrained, location, "text_encoder", config).to(device).eval()
        t5 = load_part(T5EncoderModel.from_pretrained, location, "text_encoder_2", config).to(device).eval()
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
