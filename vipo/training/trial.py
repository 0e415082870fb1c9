"""One call of the network before anything is computed, where its kernels are not PyTorch's own choice."""

import torch

from vipo.generators import Generator
from vipo.generators.base import Conditioning
from vipo.sampling.chain import Chain
from vipo.sampling.noise import Key, keyed_normal
from vipo.training.errors import TrainingError

_LONGEST_CAUSE = 300


def try_kernels(generator: Generator, conditioning: Conditioning, chain: Chain) -> None:
    """Predict noise of an update's micro-batch with gradients, so that what these kernels cannot do is told at once.

    Whatever it compiles is what training calls; gradients are dropped. All processes call it.

    Args:
        generator: with its network as it is trained.
        conditioning: of the micro-batch.
        chain: of training.

    Raises:
        TrainingError: a kernel does not take what this network calls it with, on this device, or has no backward pass;
            or a block cannot be compiled as a whole.
    """
    config, size = generator.config, len(next(iter(conditioning.values())))
    keys: list[Key] = [(0, "trial", row) for row in range(size)]
    latents = keyed_normal(keys, generator.latent_shape, chain.times.device)
    try:
        generator.predict(latents, chain.times[:1].expand(size), conditioning).square().mean().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_CAUSE]
        raise TrainingError(
            f"generator.attention {config.attention!r} and generator.compile {config.compile!r}: a trial call of the "
            f"network on {config.device} failed ({cause}); set generator.attention=default, or generator.compile=none"
        ) from error
    generator.network.zero_grad(set_to_none=True)
