"""A small Wan 2.1 with its causal autoencoder: clips."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from vipo.config.pretrain import PretrainConfig
from vipo.training.pretrain_parts import build_tokenizers, t5_settings


class ClipDenoiser(nn.Module):
    """The transformer with its text encoder, as the stock pipeline calls them."""

    def __init__(self, config: PretrainConfig, words: int) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(UMT5Config(**t5_settings(config, words)))
        width = config.heads * config.head_width
        self.transformer = WanTransformer3DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_width,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            text_dim=config.text_width,
            freq_dim=256,
            ffn_dim=2 * width,
            num_layers=config.blocks,
            rope_max_seq_len=64,
        )

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        sequence = self.text_encoder(ids, mask)[0] * mask[..., None]
        velocity: Tensor = self.transformer(
            hidden_states=latents, timestep=1000 * sigma, encoder_hidden_states=sequence, return_dict=False
        )[0]
        return velocity


@torch.no_grad()
def _start_from_stills(vae: nn.Module) -> None:
    """No weight on earlier frames, frames halved by leaving out and doubled by repeating.

    So what is learned from stills, which teach none of these weights, holds for every frame of a clip.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv3d) or module.kernel_size[0] == 1:
            continue
        if name.endswith("time_conv"):
            for parameter in module.parameters():
                parameter.zero_()
            inputs = module.in_channels
            module.weight[:, :, -1, 0, 0] = torch.eye(inputs).repeat(module.out_channels // inputs, 1)
        else:
            module.weight[:, :, :-1] = 0


class Clips:
    """See `vipo.training.pretrain_parts.Family`."""

    autoencoder_class: Any = AutoencoderKLWan
    # It has convolutions over pictures and over clips, which no format but this serves both.
    memory_format = torch.contiguous_format

    def __init__(self, config: PretrainConfig, words: list[str]) -> None:
        self._config, self._words = config, words
        self._t5 = build_tokenizers(config, words)[1]

    def autoencoder(self) -> Any:
        channels = self._config.latent_channels
        vae = AutoencoderKLWan(
            base_dim=self._config.autoencoder_width,
            z_dim=channels,
            dim_mult=[1, 1, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            # Folded into the encoder's last convolution, as in pictures.
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            scale_factor_spatial=4,
        )
        _start_from_stills(vae)
        return vae

    def norm(self) -> nn.Module:
        return nn.BatchNorm3d(self._config.latent_channels, affine=False, momentum=0.02)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encode(pixels).latent_dist.mode()
        return latents

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        # The stock call cuts its result to [-1, 1], where a pixel beyond has no gradient and never comes back.
        frames: list[Tensor] = []
        hook = vae.decoder.register_forward_hook(lambda _decoder, _arguments, made: frames.append(made))
        try:
            vae.decode(latents)
        finally:
            hook.remove()
        return torch.cat(frames, dim=2)

    def latent_layer(self, vae: Any) -> Any:
        return vae.quant_conv

    def denoiser(self) -> nn.Module:
        return ClipDenoiser(self._config, len(self._t5))

    def packed(self, latents: Tensor) -> Tensor:
        return latents

    def velocity(self, denoiser: nn.Module, latents: Tensor, sigma: Tensor, texts: Sequence[str]) -> Tensor:
        tokens = self._t5(
            list(texts),
            max_length=self._config.max_sequence_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        velocity: Tensor = denoiser(latents, sigma, tokens.input_ids, tokens.attention_mask)
        return velocity

    def pipeline(self, vae: Any, denoiser: Any) -> Any:
        return WanPipeline(
            # See `Pictures.pipeline`.
            tokenizer=build_tokenizers(self._config, self._words)[1],
            text_encoder=denoiser.text_encoder,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self._config.sampling_shift),
            transformer=denoiser.transformer,
        )
