"""One call of the network before anything is computed, where its kernels are not PyTorch's own choice."""

from vipo.generators import Generator
from vipo.generators.applied import kernel_errors
from vipo.generators.base import Conditioning
from vipo.sampling.chain import Chain
from vipo.sampling.noise import Key, keyed_normal


def try_kernels(generator: Generator, conditioning: Conditioning, chain: Chain) -> None:
    """Predict noise, with gradients, as an update calls, so that what these kernels cannot do is told at once.

    Whatever it compiles is what training calls; gradients are dropped. All processes call it.

    Args:
        generator: with its network as it is trained.
        conditioning: of the call's samples.
        chain: of training.

    Raises:
        KernelError: a kernel does not take what this network calls it with, on this device, or has no backward pass; or
            a block cannot be compiled as a whole.
    """
    size = len(next(iter(conditioning.values())))
    keys: list[Key] = [(0, "trial", row) for row in range(size)]
    latents = keyed_normal(keys, generator.latent_shape, chain.times.device)
    with kernel_errors(generator.config):
        generator.predict(latents, chain.times[:1].expand(size), conditioning).square().mean().backward()
    generator.network.zero_grad(set_to_none=True)
