"""A small FLUX with an `AutoencoderTiny`: pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from vipo.config.pretrain import PretrainConfig
from vipo.generators.flux import image_ids
from vipo.generators.packing import pack_latents
from vipo.training.pretrain_parts import build_tokenizers, t5_settings


class PictureDenoiser(nn.Module):
    """The transformer with its two text encoders, as the stock pipeline calls them."""

    def __init__(self, config: PretrainConfig, clip: CLIPTokenizer, words: int) -> None:
        super().__init__()
        width = config.text_width
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=1,
                num_attention_heads=width // 32,
                max_position_embeddings=config.max_sequence_length,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )
        self.text_encoder_2 = T5EncoderModel(T5Config(**t5_settings(config, words)))
        head = config.head_width
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * config.latent_channels,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=head,
            num_attention_heads=config.heads,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=False,
            axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
        )

    def forward(self, packed: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor, grid: Tensor) -> Tensor:
        pooled = self.text_encoder(clip_ids).pooler_output
        sequence = self.text_encoder_2(t5_ids)[0]
        velocity: Tensor = self.transformer(
            hidden_states=packed,
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=sequence,
            txt_ids=torch.zeros(sequence.shape[1], 3),
            img_ids=grid,
            return_dict=False,
        )[0]
        return velocity


class Pictures:
    """See `vipo.training.pretrain_parts.Family`."""

    autoencoder_class: Any = AutoencoderTiny
    memory_format = torch.channels_last

    def __init__(self, config: PretrainConfig, words: list[str]) -> None:
        self._config, self._words = config, words
        self._clip, self._t5 = build_tokenizers(config, words)

    def autoencoder(self) -> Any:
        width = self._config.autoencoder_width
        return AutoencoderTiny(
            encoder_block_out_channels=(width,) * 3,
            decoder_block_out_channels=(width,) * 3,
            # No blocks at full resolution: they would cost more than all the others together.
            num_encoder_blocks=(0, 1, 2),
            num_decoder_blocks=(2, 1, 0),
            latent_channels=self._config.latent_channels,
        )

    def norm(self) -> nn.Module:
        return nn.BatchNorm2d(self._config.latent_channels, affine=False, momentum=0.02)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encoder(pixels)
        return latents

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        pixels: Tensor = vae.decoder(latents)
        return pixels

    def latent_layer(self, vae: Any) -> Any:
        return vae.encoder.layers[-1]

    def denoiser(self) -> nn.Module:
        return PictureDenoiser(self._config, self._clip, len(self._t5))

    def packed(self, latents: Tensor) -> Tensor:
        return pack_latents(latents)

    def velocity(self, denoiser: nn.Module, latents: Tensor, sigma: Tensor, texts: Sequence[str]) -> Tensor:
        arguments = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        length = self._config.max_sequence_length
        clip_ids, t5_ids = (
            tokenizer(list(texts), max_length=length, **arguments).input_ids for tokenizer in (self._clip, self._t5)
        )
        grid = image_ids(latents.shape[-2], latents.shape[-1], "cpu")
        velocity: Tensor = denoiser(pack_latents(latents), sigma, clip_ids, t5_ids, grid)
        return velocity

    def pipeline(self, vae: Any, denoiser: Any) -> Any:
        # A tokenizer's file tells how it was last called, which a run that had nothing left to learn never did.
        clip, t5 = build_tokenizers(self._config, self._words)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self._config.sampling_shift),
            vae=vae,
            text_encoder=denoiser.text_encoder,
            tokenizer=clip,
            text_encoder_2=denoiser.text_encoder_2,
            tokenizer_2=t5,
            transformer=denoiser.transformer,
        )
