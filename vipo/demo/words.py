"""Drawn words: a short word in one ink on paper of one colour, and its captions.

The second kind of picture that a demo generator can be trained on (``pretrain.drawn: words``); reward `ocr` reads them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vipo.demo.scenes import BACKGROUNDS, COLORS

HEIGHT, WIDTH = 32, 64
INKS = {name: COLORS[name] for name in ("red", "green", "blue", "purple")}
PAPERS = {"white": BACKGROUNDS["white"], "mint": BACKGROUNDS["mint"], "yellow": COLORS["yellow"]}
_TEXT = """
up on no we us me my so an at be by do
ant arm art bag bat bed bee big box boy bus cap car cat cow cup day dog ear egg eye fan fat fly fog fox fun
gas gum hat hen hot ice ink jam jar key kid leg lip log man map mud net new nut oak old owl pan pen pig
pot red rug run sad sea sky sun tea ten toe top toy van wax web win
baby ball bear bell bird blue boat book cake city coat corn deer door duck farm fire fish flag foot frog game
gate gift girl goat gold hand hero hill home hope jazz joke jump kite king lake lamp leaf lion love mask milk
moon nest nose park path pear pink quiz rain ring road rock roof rose sail sand ship shoe snow soap song star
taxi tree vase wave wind wolf wood yard zero
"""
WORDS = tuple(_TEXT.split())
"""What is written in prompts: words of two to four letters."""

_LONG_TEXT = """
apple beach bench black bread brick bride brush cabin camel candy chain chair chalk chest child clock cloud coast
couch crane cream crown dance dream dress drink eagle earth fence field flame flute frame fruit ghost giant glass
globe glove grape grass green heart honey horse hotel house jeans juice knife lemon light lunch metal money month
mouse mouth music night north novel ocean olive onion opera paint paper party pearl piano plane plant plate queen
quilt radio river robot salad scarf sheep shirt skirt smoke snake snail south spoon stage stamp stone storm stove
sugar table tiger toast tower towel train truck uncle viola wagon watch water whale wheat wheel world wrist youth
zebra
"""
LONG_WORDS = tuple(_LONG_TEXT.split())
"""Words of five letters, one more than any that the generator is trained on; they just fit on the paper."""

_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
_POINTS = 22
_LEFT, _TOP, _JITTER = 5, 8, 2


@dataclass(frozen=True)
class DrawnWord:
    """A word with its ink and paper (names); `x`, `y` (pixels) is the upper left corner of its letters' line."""

    word: str
    ink: str
    paper: str
    x: int
    y: int


def is_held_out(word: str) -> bool:
    """Whether a word is kept out of training (one in four, by hash)."""
    return hashlib.sha256(f"word {word}".encode()).digest()[0] % 4 == 0


def sample_word(rng: np.random.Generator) -> DrawnWord:
    """A random picture: half of them of `WORDS`, half of two to four letters at random; none that is held out."""
    word = ""
    while not word or (word in WORDS and is_held_out(word)):
        known = rng.random() < 0.5
        word = str(rng.choice(WORDS)) if known else "".join(rng.choice(_LETTERS, size=rng.integers(2, 5)))
    x, y = (int(corner + rng.integers(-_JITTER, _JITTER + 1)) for corner in (_LEFT, _TOP))
    return DrawnWord(word, str(rng.choice(list(INKS))), str(rng.choice(list(PAPERS))), x, y)


def typeface() -> ImageFont.FreeTypeFont:
    """The letters' font, all of one width; it ships with matplotlib."""
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), _POINTS, layout_engine=ImageFont.Layout.BASIC)


def draw(item: DrawnWord, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    """The picture, ``(3, 32, 64)`` uint8: the word in capitals, smooth edges."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), _levels(PAPERS[item.paper]))
    text = item.word.upper()
    # "H" has the height of every capital, so all words stand on one line.
    top = font.getbbox("H")[1]
    ImageDraw.Draw(picture).text((item.x, item.y - top), text, font=font, fill=_levels(INKS[item.ink]))
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def captions(item: DrawnWord) -> tuple[str, ...]:
    """With and without the ink."""
    return caption(item.word, item.paper), caption(item.word, item.paper, item.ink)


def caption(word: str, paper: str, ink: str | None = None) -> str:
    """As in ``the word "cat" in red on white``."""
    return f'the word "{word}"{"" if ink is None else f" in {ink}"} on {paper}'


def word_captions(held_out: bool, words: Sequence[str] = WORDS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Captions without ink of all `words` that are held out or of all others, each with what is to be read."""
    for word in words:
        if is_held_out(word) == held_out:
            for paper in PAPERS:
                yield caption(word, paper), {"text": word}


def _levels(color: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in color)
    return red, green, blue
