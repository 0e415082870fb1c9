"""Checkpoints of a family's class that its adapter does not hold, named by the setting that tells them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipo.generators.base import GeneratorError


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
