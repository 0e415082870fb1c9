"""One setting of the process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """How a setting is read and put back.

    Attributes:
        read: its value, which does not change any more.
        write: puts such a value back; None where that is impossible.
        own: whether code that changed it finds its own value again at its next call. Otherwise it is the caller's.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object] | None
    own: bool = True


def attribute(holder: Any, name: str) -> Setting:
    """A module's or an object's attribute that is a plain value."""
    return Setting(lambda: getattr(holder, name), lambda value: setattr(holder, name, value))
