"""Which decoded frames a latent frame of a video stands for."""

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError


def causal_frame_groups(frames: int, factor: int = 4) -> tuple[range, ...]:
    """The decoded frames that each latent frame of a causal video VAE (Wan, HunyuanVideo, CogVideoX) covers.

    Latent frame 0 is frame 0; latent frame j covers frames ``factor * (j - 1) + 1`` to ``factor * j``.

    Args:
        frames: decoded frames, 1 plus a multiple of `factor`.
        factor: temporal compression.

    Raises:
        ValueError: no causal VAE decodes to that many frames.
    """
    if factor < 1 or frames < 1 or (frames - 1) % factor:
        raise ValueError(f"frames: {frames} must be 1 plus a multiple of factor {factor}, as a causal VAE decodes")
    return range(0, 1), *(range(start, start + factor) for start in range(1, frames, factor))


def configured_frame_groups(config: GeneratorConfig, factor: int) -> tuple[range, ...]:
    """`causal_frame_groups` of ``generator.frames``.

    Raises:
        GeneratorError: no causal VAE decodes to that many frames.
    """
    try:
        return causal_frame_groups(config.sample_shape[0], factor)
    except ValueError as error:
        raise GeneratorError(
            f"generator.frames {config.frames} is not of the form 1 + {factor} k (causal autoencoder)"
        ) from error
