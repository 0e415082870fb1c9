"""A prompt: its cleaned text, and the identity that everything else of it hangs on."""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vipo.errors import VipoError

ID_DIGITS = 16


class PromptError(VipoError):
    """Prompts that cannot be used; the message names the file, the row or key, and what to do."""


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` is `prompt_id` of `text`; `metadata` holds the source row's other keys (plain JSON values)."""

    id: str
    text: str
    metadata: dict[str, Any]


def clean_text(text: str) -> str:
    """The text in Unicode NFC on one line; idempotent.

    Control characters and lone surrogates are removed, every run of white space (newlines and
    no-break spaces too) becomes one space, the ends are stripped. Nothing is escaped or translated:
    markup, quotes, emoji with their joiners and right-to-left marks stay as they are.
    """
    kept = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    # Last, because a removed character may have stood between a letter and its accent.
    return unicodedata.normalize("NFC", " ".join(kept.split()))


# Characters that leave no mark on the page though Unicode does not call them format characters or blanks: fillers,
# joiners, variation selectors, the empty pattern of Braille and the empty note head; and what Unicode keeps for more of
# them (Default_Ignorable_Code_Point).
_UNSEEN = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\U0001d159\U00016fe4"
    + "".join(map(chr, (0x2065, *range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000))))
)


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, controls, format characters (zero-width ones), fillers."""
    return all(
        c.isspace() or c in _UNSEEN or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp") for c in text
    )


def categories_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The categories of a prompt by the `category` of its metadata: none, one, or those of a list, each once."""
    found = metadata.get("category")
    named = found if isinstance(found, list) else [found]
    return tuple(dict.fromkeys(str(value) for value in named if value not in (None, "")))


def duplicate_key(text: str) -> str:
    """What two cleaned texts share when they differ in letter case alone (`clean_text` evens out white space)."""
    return unicodedata.normalize("NFC", text.casefold())


def prompt_id(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a cleaned text (UTF-8): a safe file name."""
    return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]


def is_evaluation(identity: str, share: float) -> bool:
    """Whether a prompt is held out: its id, read as a fraction of 1, lies below `share`. No other prompt has a say."""
    return int(identity, 16) < share * 2.0 ** (4 * ID_DIGITS)
