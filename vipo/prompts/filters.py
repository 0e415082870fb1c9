"""What drops a prompt by the wish of the configuration."""

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from vipo.config.prompts import FilterConfig
from vipo.prompts.prompt import PromptError, clean_text
from vipo.regular import read_regular

Filter = Callable[[str], bool]

_MOST_BYTES = 2**24
_SHARE = 0.9


def load_filters(config: FilterConfig, root: Path, tokens: Callable[[str], int] | None) -> list[tuple[str, Filter]]:
    """The filters that are asked for, by the reason that the manifest counts: each says whether a text is dropped.

    Args:
        config: section `prompts.filters`.
        root: folder that a relative blocklist starts at.
        tokens: counts a text's tokens; needed for `max_tokens` alone.

    Raises:
        PromptError: the blocklist cannot be read, or names nothing.
    """
    found: list[tuple[str, Filter]] = []
    if (most := config.max_tokens) is not None:
        if tokens is None:
            raise PromptError("prompts.filters.max_tokens: nothing counts tokens here; run 'vipo prepare'")
        count = tokens
        found.append(("too_many_tokens", lambda text: count(text) > most))
    if (script := config.script) is not None:
        found.append(("other_script", lambda text: not is_of_script(text, script)))
    if config.blocklist is not None:
        pattern = _blocked(config.blocklist, root)
        found.append(("blocked", lambda text: pattern.search(text.casefold()) is not None))
    return found


def is_of_script(text: str, script: str) -> bool:
    """Whether nine of ten letters are of a script, by the first word of their Unicode names; without letters, yes."""
    letters = [c for c in text if c.isalpha()]
    return sum(unicodedata.name(c, "").startswith(f"{script} ") for c in letters) >= _SHARE * len(letters)


def _blocked(name: str, root: Path) -> re.Pattern[str]:
    try:
        text = read_regular(root / name, _MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompts.filters.blocklist {name}: cannot be read ({error}); give a UTF-8 file") from error
    words = sorted({word for line in text.splitlines() if (word := clean_text(line).casefold())}, key=len, reverse=True)
    if not words:
        raise PromptError(f"prompts.filters.blocklist {name}: names nothing; write a word or phrase a line")
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")
