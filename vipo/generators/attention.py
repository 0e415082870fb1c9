"""Where a network's picture attends to the prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vipo.config.generator import GeneratorConfig

Words = Callable[[GeneratorConfig, Path, Sequence[str]], list[list[int]]]
"""From prompts to the places of their words among the keys of the text, in order."""


@dataclass(frozen=True)
class TextAttention:
    """Where a network's picture attends to the prompt.

    Attributes:
        layers: regular expressions of the attention modules' names, in the order in which they are called.
        keys: 'cross': the keys are the text's alone; 'first', 'last': the text's stand before, or after, the picture's.
        words: the prompts' words among the keys of the text.
        patch: of joint attention, latent pixels a side of a picture's token.
        multiple: where the text's keys stand last, the picture's are filled up to a multiple of this.
    """

    layers: tuple[str, ...]
    keys: Literal["cross", "first", "last"]
    words: Words
    patch: int = 1
    multiple: int = 1
