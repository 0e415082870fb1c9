"""Text that others wrote (names, keys, prompts, exceptions), made safe to print: the one place.

A control character can move a terminal's cursor and colour what it shows, a new line can forge a verdict, an override
of the direction can turn a name around, and half a surrogate cannot be printed at all. They are shown as escapes.
"""

import logging
import re
from collections.abc import Sequence

# C0 and C1 controls but for new line and tab, separators of lines, overrides of direction, surrogates.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_LINE, _LONGEST_CAUSE, _MOST_LINES = 900, 300, 20


def visible(text: str) -> str:
    """`text` with everything that is no sign shown as ``\\x1b`` or ``\\u202e``; new lines and tabs stay."""
    return _HIDDEN.sub(lambda found: _escape(found[0]), text)


def one_line(text: str, limit: int = _LONGEST_LINE) -> str:
    """`text` in one line, new lines and tabs as escapes too; its middle is left out beyond `limit` characters."""
    return shortened(visible(text).replace("\n", "\\n").replace("\t", "\\t"), limit)


def shortened(text: str, limit: int) -> str:
    """`text` without its middle where it has more than `limit` characters: what is wrong begins it, the fix ends it."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]} … ({len(text) - limit} characters left out) … {text[head - limit :]}"


def cause(error: Exception) -> str:
    """A library's error as a message quotes it: its kind and the beginning of what it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_CAUSE]


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def indented(text: str) -> str:
    """Lines of which only the first begins at the margin, so that none can pass for another message's first."""
    return visible(text).replace("\n", "\n  ")


def message(text: str) -> str:
    """An error's text for the terminal: safe, indented, and of a length that a person reads."""
    lines = [shortened(line, _LONGEST_LINE) for line in text.split("\n") if line.strip()]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"… and {len(lines) - _MOST_LINES} lines more"]
    return indented("\n".join(lines))


class Formatter(logging.Formatter):
    """Log records whose texts are `indented`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, safe to print."""
        return indented(super().format(record).rstrip())


def _escape(sign: str) -> str:
    code = ord(sign)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
