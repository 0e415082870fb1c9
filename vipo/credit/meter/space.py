"""Where gradients are kept: whole, or as a sketch that keeps their inner products."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vipo.sampling.noise import keyed_generator

# Of the bucket indices, drawn in pieces, so that a sketch of a large network needs no array of its size on the CPU.
_PIECE = 2**24


@dataclass(frozen=True)
class Whole:
    """Gradients as they are: `size` numbers, and no error."""

    size: int
    error: float = 0.0

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient


class CountSketch:
    """Each entry, with a random sign, added to one of `size` buckets.

    Inner products of sketches are unbiased, with a variance of at most ``(|a|^2 |b|^2 + <a, b>^2) / size``: a cosine
    gets a standard deviation of ``sqrt((1 + cos^2) / size)``, at most ``sqrt(2 / size)``. The draws are keyed: the same
    key and length give the same sketch on every machine. It is linear, so that it can be summed piece by piece.

    Attributes:
        size: numbers that are kept of a gradient.
        error: the largest standard deviation that a cosine gets from it.

    Source: Charikar, Chen and Farach-Colton (2002); the variance is that of Weinberger et al. (2009).
    """

    def __init__(self, parameters: int, size: int, seed: int, device: torch.device | str = "cpu") -> None:
        """Draw it.

        Args:
            parameters: P, the length of what is sketched.
            size: buckets.
            seed: with the lengths, the key of the draws.
            device: where gradients are.

        Raises:
            ValueError: `size` is not in [1, 2^31).
        """
        if not 1 <= size < 2**31:
            raise ValueError(f"size: {size} must be in [1, 2^31)")
        self.size, self.error = size, math.sqrt(2 / size)
        buckets, signs = [], []
        for number, start in enumerate(range(0, parameters, _PIECE)):
            generator = keyed_generator(seed, "sketch", parameters, size, number)
            length = (min(_PIECE, parameters - start),)
            buckets.append(torch.randint(size, length, generator=generator, dtype=torch.int32).to(device))
            signs.append(torch.randint(2, length, generator=generator, dtype=torch.int8).to(device))
        self._buckets, self._signs = torch.cat(buckets), torch.cat(signs).mul_(2).sub_(1)

    def __call__(self, gradient: Tensor) -> Tensor:
        sketch = torch.zeros(self.size, dtype=torch.float64, device=gradient.device)
        return sketch.index_add_(0, self._buckets, (gradient * self._signs).double()).float()


Space = Whole | CountSketch
"""A linear map of a gradient ``(P,)`` to ``(size,)`` that keeps inner products."""


def choose_space(
    parameters: int, vectors: int, memory: int, seed: int, device: torch.device | str = "cpu"
) -> tuple[Space, str]:
    """Whole gradients where they fit, else the largest power of two that does.

    Args:
        parameters: P.
        vectors: how many gradients are held at once.
        memory: bytes that they may take.
        seed: keys a sketch.
        device: where gradients are.

    Returns:
        The space, and a sentence that tells which.
    """
    needed = 4 * parameters * vectors
    if needed <= memory:
        return Whole(parameters), f"whole gradients: {vectors} of {parameters:,} numbers, {needed / 2**20:.0f} MiB"
    size = 2 ** max(10, min(30, int(math.log2(max(memory / (4 * vectors), 1)))))
    sketch = CountSketch(parameters, size, seed, device)
    return sketch, (
        f"gradients of {parameters:,} numbers are sketched to {size:,} (whole ones would take "
        f"{needed / 2**20:.0f} MiB): a cosine gets a standard deviation of at most {sketch.error:.2g} from it"
    )


def products(vectors: Sequence[Tensor] | Tensor, others: Tensor) -> Tensor:
    """Inner products ``(n, m)`` float64 on the CPU, of ``(n, P)`` with ``(m, P)``, accumulated in pieces.

    Float32 products of pieces, summed in float64: the rounding of one long float32 sum would be of the size of the
    cosines that are asked for.
    """
    rows = vectors if isinstance(vectors, Tensor) else torch.stack(list(vectors))
    piece, total = 2**16, torch.zeros(len(rows), len(others), dtype=torch.float64)
    for start in range(0, rows.shape[1], piece):
        total += (rows[:, start : start + piece] @ others[:, start : start + piece].T).double().cpu()
    return total
