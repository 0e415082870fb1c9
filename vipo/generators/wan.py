"""Wan text-to-video (`WanTransformer3DModel`): guidance by a negative prompt, 1000 sigma as time, causal frames."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import T5TokenizerFast, UMT5EncoderModel

from vipo.config.generator import GeneratorConfig
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.experts import Experts
from vipo.generators.frames import configured_frame_groups
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import load_text_encoder, rows, with_negative
from vipo.generators.variants import refuse_channels, refuse_settings
from vipo.generators.words import WAN

_NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "image_dim": "takes the embedding of a picture (image-to-video)",
        "added_kv_proj_dim": "attends to a picture (image-to-video)",
        "pos_embed_seq_len": "takes the embeddings of a first and a last picture",
    }
)


_FOLDERS = ("transformer", "transformer_2")


class WanGenerator(PipelineGenerator):
    """Wan 2.1 T2V.

    Attributes:
        times_of_tokens: whether the network takes a timestep for each token; from text alone they are all the same.
    """

    times_of_tokens: ClassVar[bool] = False
    frame_rate: ClassVar[int | None] = 16
    text_attention: ClassVar[TextAttention | None] = WAN
    pipeline_class: ClassVar[Any] = WanPipeline
    network_class: ClassVar[Any] = WanTransformer3DModel
    autoencoders: ClassVar[Mapping[str, Any]] = MappingProxyType({"AutoencoderKLWan": AutoencoderKLWan})
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({"encoder_hidden_states": "text_dim"})

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        settings, channels = vae.config, network.config.in_channels
        space, factor = settings.scale_factor_spatial, settings.scale_factor_temporal
        self.check_size(space * network.config.patch_size[1])
        self.frame_groups = configured_frame_groups(config, factor)
        self.latent_shape = (channels, len(self.frame_groups), config.height // space, config.width // space)
        patches = zip(self.latent_shape[1:], network.config.patch_size, strict=True)
        self._tokens = math.prod(side // patch for side, patch in patches)
        self._mean, self._std = self.latent_scales(3)

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        refuse_settings(location, "transformer", network, _NEEDS)
        refuse_channels(location, "transformer", network, ("z_dim", vae.z_dim), "image-to-video checkpoints")

    @classmethod
    def check_index(cls, location: Path | str, index: Mapping[str, Any]) -> None:
        pair = index.get("boundary_ratio") is not None or any(index.get("transformer_2") or ())
        if pair and cls.second_folder is None:
            raise GeneratorError(f"{location}: has two transformers (Wan 2.2 A14B); set generator.family=wan22_a14b")
        if bool(index.get("expand_timesteps")) != cls.times_of_tokens:
            kind = "one timestep" if cls.times_of_tokens else "its own timestep"
            other = "wan" if cls.times_of_tokens else "wan22_ti2v"
            raise GeneratorError(
                f"{location}/model_index.json: expand_timesteps gives every token {kind}; set generator.family={other}"
            )

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location = checkpoint_location(config, root)
        tokenizer, encoder = load_text_encoder(
            config,
            location,
            (T5TokenizerFast, "tokenizer"),
            (UMT5EncoderModel, "text_encoder"),
            [*texts, config.negative_prompt],
            config.max_sequence_length,
        )
        pipeline = WanPipeline(tokenizer, encoder, vae=None, scheduler=None)

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            positive, _ = pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
            )
            return rows(encoder_hidden_states=positive)

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            timestep = 1000 * sigma
            if self.times_of_tokens:
                timestep = timestep[:, None].expand(-1, self._tokens)
            velocity: Tensor = self.network(hidden_states=x, timestep=timestep, return_dict=False, **given)[0]
            return velocity

        return self.guided(call, latents, time, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        video = self.vae.decode(latents * self._std + self._mean, return_dict=False)[0].transpose(1, 2)
        return (video.float() / 2 + 0.5).clamp(0, 1)


class Wan22TextImageGenerator(WanGenerator):
    """Wan 2.2 TI2V-5B, from text alone: an autoencoder of 16 x 16 pixels, a timestep for each token."""

    frame_rate: ClassVar[int | None] = 24
    times_of_tokens: ClassVar[bool] = True


class Wan22PairGenerator(WanGenerator):
    """Wan 2.2 T2V-A14B: `transformer` acts from the noise level ``boundary_ratio`` on, `transformer_2` below.

    Each has its own guidance scale; `generator.experts` says which are trained.
    """

    second_folder: ClassVar[str | None] = "transformer_2"

    @classmethod
    def joined(cls, config: GeneratorConfig, index: Mapping[str, Any], networks: Sequence[Any]) -> Any:
        trained = {"both": _FOLDERS, "high_noise": _FOLDERS[:1], "low_noise": _FOLDERS[1:]}[config.experts]
        high, low = networks
        return Experts(high, low, 1000 * index["boundary_ratio"], trained)

    @classmethod
    def check_index(cls, location: Path | str, index: Mapping[str, Any]) -> None:
        super().check_index(location, index)
        ratio = index.get("boundary_ratio")
        if not isinstance(ratio, float) or not 0 < ratio < 1:
            raise GeneratorError(
                f"{location}/model_index.json: boundary_ratio {ratio!r}: no noise level between 0 and 1 at which one "
                "transformer follows the other, as Wan 2.2 A14B has it"
            )

    @classmethod
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        super().check(config, root)
        # As in the stock pipeline, the first scale decides whether there is guidance at all.
        if config.guidance_scale_2 is not None and config.guidance_scale <= cls.neutral_guidance:
            raise GeneratorError(
                f"generator.guidance_scale_2 {config.guidance_scale_2}: guidance_scale {config.guidance_scale} turns "
                "guidance off for both transformers; leave it out, or raise guidance_scale above 1"
            )

    @classmethod
    def stock_arguments(cls, config: GeneratorConfig) -> Mapping[str, object]:
        return {"guidance_scale_2": config.guidance_scale_2}

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        # A wrapper of the network may take its place.
        self._boundary = network.boundary

    @property
    def networks(self) -> Mapping[str, Any]:
        return {part: getattr(self.network, part) for part in self.network.trained}

    def replace_network(self, part: str, loaded: Any) -> None:
        setattr(self.network, part, loaded)

    def read_no_values(self, *, one_time: bool) -> None:
        acting = self.network.trained[:1] if one_time else _FOLDERS
        self.network.acting = {name: name in acting for name in _FOLDERS}

    def guidance_at(self, time: Tensor) -> Any:
        low = self.config.guidance_scale_2
        if low is None:
            return self.config.guidance_scale
        high = 1000 * time >= self._boundary
        return torch.where(high, self.config.guidance_scale, low).view(-1, 1, 1, 1, 1)
