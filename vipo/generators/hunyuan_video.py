"""HunyuanVideo 1.5 (`HunyuanVideo15Transformer3DModel`): a language model reads prompts, ByT5 quoted words."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, Qwen2Tokenizer, T5EncoderModel

from vipo.config.generator import GeneratorConfig
from vipo.generators import templates
from vipo.generators.attention import TextAttention
from vipo.generators.base import Conditioning, GeneratorError, checkpoint_location
from vipo.generators.frames import configured_frame_groups
from vipo.generators.parts import part_class, part_settings
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.texts import load_text_encoder, rows, with_negative
from vipo.generators.variants import refuse_channels, refuse_settings
from vipo.generators.words import HUNYUAN_VIDEO

log = logging.getLogger(__name__)

_NEEDS: Mapping[str, str] = MappingProxyType({"use_meanflow": "takes a second timestep (MeanFlow)"})
# Of the guider, what would make another prediction of the same two.
_GUIDER: Mapping[str, object] = MappingProxyType(
    {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
)
# Tokens of the words in quotes, to which the stock pipeline pads.
_GLYPHS = 256
_NAMES = ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2")


class _AllWords(TorchFunctionMode):
    """Masks hold no data: what they choose is everything, and what they leave is nothing.

    The network puts the chosen tokens of its texts before the others, which are as many either way.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__:
            return True
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0][:0] if getattr(args[1], "inverted", False) else args[0]
        made = func(*args, **(kwargs or {}))
        if func is Tensor.__invert__:
            made.inverted = True
        return made


class HunyuanVideo15Generator(PipelineGenerator):
    """HunyuanVideo 1.5 text-to-video."""

    frame_rate: ClassVar[int | None] = 24
    # The other one reads quoted words alone.
    prompt_tokenizers: ClassVar[Sequence[str] | None] = ("tokenizer",)
    text_attention: ClassVar[TextAttention | None] = HUNYUAN_VIDEO
    pipeline_class: ClassVar[Any] = HunyuanVideo15Pipeline
    network_class: ClassVar[Any] = HunyuanVideo15Transformer3DModel
    autoencoders: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"AutoencoderKLHunyuanVideo15": AutoencoderKLHunyuanVideo15}
    )
    longest_sequence: ClassVar[int | None] = 1000
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({_NAMES[0]: "text_embed_dim", _NAMES[2]: "text_embed_2_dim"})
    masks: ClassVar[tuple[str, ...]] = (_NAMES[1], _NAMES[3])

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        super().__init__(config, network, vae)
        self._lengths: AbstractContextManager[Any] = contextlib.nullcontext()
        # The mask of its attention fits one video alone (diffusers 0.42).
        self.vae.enable_slicing()
        settings = vae.config
        space, factor = settings.spatial_compression_ratio, settings.temporal_compression_ratio
        self.check_size(space * network.config.patch_size)
        self.frame_groups = configured_frame_groups(config, factor)
        channels = settings.latent_channels
        self.latent_shape = (channels, len(self.frame_groups), config.height // space, config.width // space)
        self._image_width = network.config.image_embed_dim

    @classmethod
    def _check_settings(
        cls, config: GeneratorConfig, root: Path, location: Path | str, index: Mapping[str, Any]
    ) -> None:
        super()._check_settings(config, root, location, index)
        if "guider" not in index:
            return
        kind = part_class(location, index, "guider", {ClassifierFreeGuidance.__name__: ClassifierFreeGuidance})
        guider = part_settings(kind, location, "guider", config)
        for key, held in _GUIDER.items():
            if (value := getattr(guider, key)) != held:
                raise GeneratorError(
                    f"{location}/guider: {key} {value!r}: generator.guidance_scale alone guides here, at every step; "
                    f"give a checkpoint with {held}"
                )
        off = not guider.enabled or guider.guidance_scale <= cls.neutral_guidance
        if off and config.guidance_scale > cls.neutral_guidance:
            log.warning(
                "generator.guidance_scale %s guides a checkpoint whose own guider does not (guidance_scale %s), as "
                "where guidance is distilled into the network; set it to 1",
                config.guidance_scale,
                guider.guidance_scale if guider.enabled else "off",
            )

    @classmethod
    def stock_guidance(cls, config: GeneratorConfig) -> float | None:
        # Below 1, the guider would draw towards the negative prompt.
        return max(config.guidance_scale, cls.neutral_guidance)

    @classmethod
    def conditioning_lengths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        return dict.fromkeys(_NAMES[2:], _GLYPHS)

    def read_no_values(self, *, one_time: bool) -> None:
        self._lengths = _AllWords()

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        refuse_settings(location, "transformer", network, _NEEDS)
        if network.in_channels != 2 * network.out_channels + 1:
            raise GeneratorError(
                f"{location}/transformer: in_channels {network.in_channels} and out_channels {network.out_channels}; "
                "HunyuanVideo 1.5 takes latents, those of a first frame and a mask"
            )
        latents = SimpleNamespace(in_channels=network.out_channels)
        refuse_channels(location, "transformer", latents, ("latent_channels", vae.latent_channels), "")

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location, device = checkpoint_location(config, root), torch.device(config.device)
        template, dropped = templates.hunyuan_video()
        tokenizer, encoder = load_text_encoder(
            config,
            location,
            (Qwen2Tokenizer, "tokenizer"),
            (Qwen2_5_VLTextModel, "text_encoder"),
            [*texts, config.negative_prompt],
            config.max_sequence_length + dropped,
            template,
        )
        glyph_tokenizer, glyph_encoder = load_text_encoder(
            config, location, (ByT5Tokenizer, "tokenizer_2"), (T5EncoderModel, "text_encoder_2"), ()
        )

        def encode(prompts: list[str]) -> list[dict[str, Tensor]]:
            # The pipeline's own `encode_prompt` reads to its longest prompt; what is masked changes nothing.
            words = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
                encoder, tokenizer, prompts, device, tokenizer_max_length=config.max_sequence_length
            )
            glyphs = HunyuanVideo15Pipeline._get_byt5_prompt_embeds(glyph_tokenizer, glyph_encoder, prompts, device)
            return rows(**dict(zip(_NAMES, (*words, *glyphs), strict=True)))

        return with_negative(encode, texts, config)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        def call(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
            # No first frame: its latents, its mask and its embedding are zeros.
            with self._lengths:
                velocity: Tensor = self.network(
                    hidden_states=torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], dim=1),
                    timestep=1000 * sigma,
                    image_embeds=x.new_zeros(len(x), 1, self._image_width),
                    return_dict=False,
                    **given,
                )[0]
            return velocity

        return self.guided(call, latents, time, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents).transpose(1, 2)
