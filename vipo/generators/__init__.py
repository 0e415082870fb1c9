"""Generator adapters: one file a family, one registry line, or an import path.

An adapter hides how a family packs latents, conditions its network, guides and decodes (docs/generators.md). Inside
vipo all latents are ``(B, C, [T,] H, W)`` float32, predictions are velocities ``noise - x0`` over the noise level sigma
in [0, 1], or the noise over the training timestep, and images and videos are in [0, 1].
"""

from vipo.generators.base import Conditioning, Generator, GeneratorError
from vipo.generators.configured import load_generator

__all__ = ["Conditioning", "Generator", "GeneratorError", "load_generator"]
