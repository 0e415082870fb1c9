"""The demo's prompt files, written from the scenes' own captions."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vipo.demo import motion
from vipo.demo.scenes import one_object_captions, two_object_captions
from vipo.demo.words import LONG_WORDS, WORDS, word_captions

#: Of the 2,160 captions of two objects.
_PAIRS = 240


def write_demo_prompts(folder: Path) -> list[Path]:
    """Write the demo's prompts with what they claim, sorted; `data/prompts` holds the committed copies.

    ``colourless.jsonl``: every one-object caption that names no colour; ``small.jsonl`` and ``large.jsonl``: those that
    name that size; ``pairs.jsonl``: some captions of two objects, colours and relation named; ``words.jsonl`` and
    ``words_held_out.jsonl``: every caption of a word that names no ink, of words that the generator was trained on and
    of words that it was not; ``long_words.jsonl`` and ``long_words_held_out.jsonl``: the same of words of five letters,
    none of which it was trained on; ``motion.jsonl``: every caption of a moving shape that names no colour.

    Args:
        folder: created where missing.

    Returns:
        The files' paths.
    """
    colourless = list(one_object_captions(named_color=False))
    # Not the text's own hash, which the split goes by.
    pairs = sorted(two_object_captions(), key=lambda row: hashlib.sha256(f"pairs {row[0]}".encode()).digest())[:_PAIRS]
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _write(folder / "colourless.jsonl", colourless),
        *(
            _write(folder / f"{size}.jsonl", [row for row in colourless if size in row[0]])
            for size in ("small", "large")
        ),
        _write(folder / "pairs.jsonl", pairs),
        *(
            _write(folder / f"{name}{'_held_out' if held_out else ''}.jsonl", word_captions(held_out, words))
            for name, words in (("words", WORDS), ("long_words", LONG_WORDS))
            for held_out in (False, True)
        ),
        _write(folder / "motion.jsonl", motion.colourless_captions()),
    ]


def _write(path: Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> Path:
    ordered = sorted(rows, key=lambda row: row[0])
    path.write_text(
        "".join(json.dumps({"prompt": text, **claims}) + "\n" for text, claims in ordered), encoding="utf-8"
    )
    return path
