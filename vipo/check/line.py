"""One line of the result, and the boundary that makes one of whatever goes wrong while it is found."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vipo.errors import VipoError
from vipo.text import one_line

Verdict = Literal["ok", "to do", "open"]
"""Fine; something must be done; not known here, where nothing is to be done either."""

_LONGEST = 600


@dataclass(frozen=True)
class Line:
    """What was found of one subject.

    Attributes:
        subject: what was looked at, such as ``generator`` or ``disk``.
        verdict: see `Verdict`.
        said: what was found, or what to do.
    """

    subject: str
    verdict: Verdict
    said: str

    def text(self, width: int) -> str:
        """For people: one line, safe to print; subjects are padded to `width`."""
        return f"{self.verdict:<6} {one_line(self.subject, 100):<{width}}  {one_line(self.said, _LONGEST)}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"subject": self.subject, "verdict": self.verdict, "said": self.said}


def ok(subject: str, said: str) -> Line:
    """A line of something that is fine."""
    return Line(subject, "ok", said)


def to_do(subject: str, said: str) -> Line:
    """A line of something that must be done."""
    return Line(subject, "to do", said)


def not_known(subject: str, said: str) -> Line:
    """A line of something that cannot be known here."""
    return Line(subject, "open", said)


def found(subject: str, look: Callable[[], Iterable[Line]]) -> Iterator[Line]:
    """The lines of `look`; what it raises is one more, and never a traceback.

    Args:
        subject: of the line that an exception becomes.
        look: what finds the lines; others' code and damaged files may be behind it.
    """
    try:
        yield from look()
    except VipoError as error:
        yield to_do(subject, str(error))
    # A doctor that dies of the illness helps nobody: whatever it is, the other subjects are still looked at.
    except Exception as error:
        yield to_do(subject, f"could not be checked ({type(error).__name__}: {error})")
