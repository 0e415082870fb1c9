"""Checkpoints of a family's class that its adapter does not hold, named by the setting that tells them."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError

_NOT_HELD: Mapping[str, str] = MappingProxyType(
    {
        "LTX2": "of LTX-2, family 'ltx2' holds LTX2Pipeline, and of that the video from text alone: no sound, no first "
        "picture or other condition, no upsampler, no second stage",
    }
)
# By the beginning of the stock pipelines' names.

log = logging.getLogger(__name__)


def not_held(pipeline: str) -> str:
    """Why a stock pipeline's checkpoints are of no family, or of another one, and what to do."""
    told = (why for start, why in _NOT_HELD.items() if pipeline.startswith(start))
    return next(told, "give such a checkpoint, or another generator.family")


def refuse_settings(location: Path | str, part: str, settings: Any, keys: Mapping[str, str]) -> None:
    """Refuse a part that has one of some settings.

    Args:
        location, part: for the message.
        settings: of the part.
        keys: what a setting makes the network ask for, by its name.

    Raises:
        GeneratorError: naming the first that is set.
    """
    for key, needs in keys.items():
        if (value := getattr(settings, key, None)) not in (None, False):
            raise GeneratorError(
                f"{location}/{part}: {key} {value!r}: its network {needs}, which vipo does not give it"
            )


def refuse_channels(
    location: Path | str, part: str, network: Any, latent: tuple[str, int], variants: str, folded: int = 1
) -> None:
    """Refuse a network that takes other latents than it makes, or an autoencoder of others.

    Args:
        location, part: for the message.
        network: its settings.
        latent: setting and value of the autoencoder's latent channels.
        variants: which checkpoints take more than they make, for the message.
        folded: latent pixels whose channels the network takes together.

    Raises:
        GeneratorError: naming the setting.
    """
    taken, made = network.in_channels, getattr(network, "out_channels", None) or network.in_channels
    if taken != made:
        raise GeneratorError(
            f"{location}/{part}: in_channels {taken} and out_channels {made}, as in {variants}; give a checkpoint that "
            "starts from text alone"
        )
    key, channels = latent
    if taken != folded * channels:
        raise GeneratorError(
            f"{location}/vae: {key} {channels}, but the {part}'s in_channels are {taken}, not {folded} times that; "
            "give the autoencoder that belongs to it"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_scales(location: Path | str, vae: Any) -> None:
    """Refuse an autoencoder whose scales of latents are none: they are read after a rollout.

    Args:
        location: for the message.
        vae: its settings.

    Raises:
        GeneratorError: naming the setting.
    """
    for key, needed in (("scaling_factor", True), ("shift_factor", False), ("batch_norm_eps", True)):
        value = getattr(vae, key, 1.0)
        if not _is_number(value) and (needed or value is not None):
            raise GeneratorError(
                f"{location}/vae: {key} {value!r} is no number; give the autoencoder's own config.json"
            )
    channels = getattr(vae, "z_dim", getattr(vae, "latent_channels", None))
    for key in ("latents_mean", "latents_std"):
        values = getattr(vae, key, None)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
            raise GeneratorError(
                f"{location}/vae: {key} {values!a:.80} is no list of numbers; give the autoencoder's own config.json"
            )
        if len(values) != channels:
            raise GeneratorError(f"{location}/vae: {key} has {len(values)} numbers for {channels} latent channels")


def check_options(
    config: GeneratorConfig, pipeline: str, guides: bool, neutral_guidance: float, longest_sequence: int | None
) -> None:
    """Refuse or tell of options that a family does not take.

    Args:
        config: section `generator`.
        pipeline: name of the stock pipeline's class.
        guides, neutral_guidance, longest_sequence: as `vipo.generators.pipeline.PipelineGenerator` has them.

    Raises:
        GeneratorError: naming the key.
    """
    if not guides and config.negative_prompt:
        raise GeneratorError(
            f"generator.negative_prompt: family {config.family!r} has no classifier-free guidance, so it would "
            "have no effect; leave it empty"
        )
    if guides and config.negative_prompt and config.guidance_scale <= neutral_guidance:
        log.warning(
            "generator.negative_prompt has no effect: generator.guidance_scale %s is not above %g, which turns "
            "classifier-free guidance off",
            config.guidance_scale,
            neutral_guidance,
        )
    if longest_sequence is not None and config.max_sequence_length > longest_sequence:
        raise GeneratorError(
            f"generator.max_sequence_length {config.max_sequence_length} is above {longest_sequence}, the "
            f"limit of {pipeline}"
        )


def check_pair(config: GeneratorConfig, pair: bool) -> None:
    """Refuse options of two networks where a family has one.

    Args:
        config: section `generator`.
        pair: whether it has two, for high and low noise.

    Raises:
        GeneratorError: naming the key.
    """
    if pair:
        return
    for key, value, neutral in (
        ("experts", config.experts, "both"),
        ("guidance_scale_2", config.guidance_scale_2, None),
        ("file_2", config.file_2, None),
    ):
        if value != neutral:
            raise GeneratorError(f"generator.{key} {value}: family {config.family!r} has one network; leave it out")
