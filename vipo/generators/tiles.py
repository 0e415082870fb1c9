"""Decoding in tiles, for samples that a decoder cannot hold whole."""

import logging
from typing import Any

from diffusers import AutoencoderTiny

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import Generator, GeneratorError

log = logging.getLogger(__name__)

_SIZES = (("tile_sample_min_height", "tile_sample_min_width"), ("tile_sample_min_size", "tile_sample_min_size"))


def decode_in_tiles(vae: Any, config: GeneratorConfig) -> None:
    """Let an autoencoder of diffusers decode tiles of its own size and overlap, blended at their seams.

    Raises:
        GeneratorError: it cannot.
    """
    if not hasattr(vae, "use_tiling"):
        raise GeneratorError(
            f"generator.decoding tiled: {type(vae).__name__} decodes no tiles; set generator.decoding=whole"
        )
    if isinstance(vae, AutoencoderTiny) and vae.spatial_scale_factor != 2 ** (len(vae.config.block_out_channels) - 1):
        raise GeneratorError(
            f"generator.decoding tiled: diffusers counts {vae.spatial_scale_factor} pixels a latent of AutoencoderTiny,"
            " of which this has others; set generator.decoding=whole"
        )
    vae.enable_tiling()
    # Which begins a second tile within the first.
    for names in () if isinstance(vae, AutoencoderTiny) else _SIZES:
        height, width = (getattr(vae, name, None) for name in names)
        if height and width and config.height <= height and config.width <= width:
            log.warning(
                "generator.decoding tiled has no effect: a sample of %d x %d is no larger than a tile of %d x %d",
                *(config.height, config.width, height, width),
            )


def check_tiles(generator: Generator, config: GeneratorConfig) -> None:
    """Refuse an adapter that does not decode as `config.decoding` says.

    Raises:
        GeneratorError: it decodes samples whole.
    """
    if config.decoding == "tiled" and not getattr(getattr(generator, "vae", None), "use_tiling", False):
        raise GeneratorError(
            f"generator.decoding tiled: family {config.family!r} decodes samples whole; set generator.decoding=whole"
        )
