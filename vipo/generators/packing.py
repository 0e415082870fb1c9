"""Latents as tokens: of 2 x 2 latent pixels, as FLUX-class networks take them, or of one."""

from collections.abc import Sequence

from torch import Tensor


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


def flat_tokens(latents: Tensor) -> Tensor:
    """``(B, C, [T,] H, W)`` to tokens of one latent pixel, ``(B, [T] H W, C)``, row-major."""
    return latents.flatten(2).transpose(1, 2)


def from_flat_tokens(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `flat_tokens`, to latents of `shape`."""
    return tokens.transpose(1, 2).reshape(tuple(shape))
