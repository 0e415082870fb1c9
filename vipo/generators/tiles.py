"""Decoding in tiles, for samples that a decoder cannot hold whole."""

import logging
from typing import Any

from diffusers import AutoencoderTiny

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError

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
    for names in _SIZES:
        height, width = (getattr(vae, name, None) for name in names)
        if height and width and config.height <= height and config.width <= width:
            log.warning(
                "generator.decoding tiled has no effect: a sample of %d x %d is no larger than a tile of %d x %d",
                *(config.height, config.width, height, width),
            )
