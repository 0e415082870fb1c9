"""Generator adapters: one file a family, one registry line, or an import path.

An adapter hides how a family packs latents, conditions its network and decodes. Inside vipo all
latents are ``(B, C, H, W)`` float32, noise levels are ``sigma`` in [0, 1], predictions are velocities
``v = noise - x0`` and images are in [0, 1].
"""

from vipo.generators.base import Conditioning, Generator, GeneratorError, load_generator

__all__ = ["Conditioning", "Generator", "GeneratorError", "load_generator"]
