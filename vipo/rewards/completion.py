"""What a chat completion says: how likely its first word is the answer, or the number that it writes."""

import math
import re
from typing import Any, NamedTuple

from vipo.rewards.errors import RewardError
from vipo.rewards.wire import finite_number

_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_EITHER = frozenset({"yes", "no"})
# What tokenizers write for a blank or a line's end before a word, where a server shows their raw pieces.
_RAW_BLANKS = "\u0120\u2581\u010a"

_FIGURE = r"\d+(?:\.\d+)?"
# A range, which is no score, or a number, each with what it is out of.
_NUMBER = re.compile(
    rf"(?:{_FIGURE}[ \t]?[-\u2013][ \t]?{_FIGURE}|(?P<number>(?:(?<![^\W_])-)?{_FIGURE}))"
    rf"(?:[\s*_(]*(?:/|(?:out )?of\b)[\s*_]*{_FIGURE})?"
)


class Read(NamedTuple):
    """What was read of one answer."""

    wanted: str
    """The answer that was looked for."""
    value: float
    """NaN: it could not be read, `why` says why."""
    why: str = ""
    heard: bool = True
    """Whether it shows that the judge can give this answer."""


def likelihood(choice: Any, answer: str) -> Read:
    """How likely the first word is the answer, in [0, 1].

    It cannot be read where neither yes nor no is what such a question is answered with, and where the first token only
    begins the answer.

    Args:
        choice: of a chat completion with log-probabilities.
        answer: one word.

    Raises:
        RewardError: the model thinks first, or what is told are no log-probabilities.
        KeyError, IndexError, TypeError, AttributeError: it is no such choice.
    """
    message = choice.get("message") or {}
    if message.get("reasoning") or message.get("reasoning_content"):
        raise RewardError("the model thinks before it answers; switch that off (option request), or take reads: number")
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        return Read(answer, math.nan, "it refused to answer", heard=False)
    first = choice["logprobs"]["content"][0]
    alternatives = [(each["token"], _probability(each["logprob"])) for each in first["top_logprobs"]]
    if not alternatives:
        raise RewardError("the answer lists no alternatives of its first word; take a server that does")
    # LMDeploy tells the chosen one beside the others.
    if "token" in first and first["token"] not in [token for token, _ in alternatives]:
        alternatives.append((first["token"], _probability(first["logprob"])))
    wanted, total = _word(answer), 0.0
    for token, probability in alternatives:
        total += probability if _word(token) == wanted else 0.0
    top = _text(max(alternatives, key=lambda each: each[1])[0])
    if wanted in _EITHER:
        if sum(probability for token, probability in alternatives if _word(token) in _EITHER) < 0.5:
            return Read(answer, math.nan, f"the first word is {top[:80]!r}, neither yes nor no", heard=False)
    # Another spelling of the whole word may be listed far behind.
    elif total < 0.01 and any(text != top and text.startswith(top) for text in (_text(answer), wanted)):
        why = (
            f"the first token is {top[:80]!r}: the answer takes several tokens, or is another; ask for one of one token"
        )
        return Read(answer, math.nan, why, heard=False)
    return Read(answer, min(total, 1.0), heard=total > 0 or wanted in _EITHER)


def written(choice: Any) -> Read:
    """The last number of what is written: a of "a/b" and of "a out of b", none of a range or of a thought.

    Args:
        choice: of a chat completion.

    Raises:
        KeyError, TypeError, AttributeError: it is no such choice.
    """
    text = choice["message"]["content"]
    if choice.get("finish_reason") == "length":
        return _unwritten("the answer was cut off; raise tokens")
    if text is None:
        return _unwritten("nothing was written")
    # A chat template may have begun the thought itself.
    text = text.rpartition("</think>")[2]
    numbers = [] if "<think>" in text else [found["number"] for found in _NUMBER.finditer(text) if found["number"]]
    value = finite_number(float(numbers[-1])) if numbers else None
    return _unwritten(f"it wrote {text[:80]!r}") if value is None else Read("a number", value)


def is_either(answer: str) -> bool:
    """Whether an answer is yes or no."""
    return _word(answer) in _EITHER


def _unwritten(why: str) -> Read:
    return Read("a number", math.nan, why, heard=False)


def _probability(told: Any) -> float:
    number = finite_number(told)
    if number is None or number > 1e-3:
        raise RewardError(f"{str(told)[:80]!r} is no log-probability")
    return math.exp(number)


def _text(token: str) -> str:
    return token.strip().lstrip(_RAW_BLANKS).strip().lower()


def _word(token: str) -> str:
    text = _text(token)
    return str(_COUNTED.index(text)) if text in _COUNTED else text
