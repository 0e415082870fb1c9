"""The boundary around every call into code that is not vipo's."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any, Literal

from vipo.errors import VipoError
from vipo.text import one_line

# On the foreign module itself: what it changed for itself belongs to it, and goes with it.
_OWN = "__vipo_own__"
_LONGEST_CAUSE = 300


@dataclass
class _Own:
    """What a module changed in the process for itself."""

    values: dict[str, Any] = field(default_factory=dict)
    inside: bool = False


class foreign:  # noqa: N801 (a context manager, read as one)
    """Code of others runs inside; outside, everything is as if it had not run.

    * Any exception, SystemExit too, becomes one error that names the part; Ctrl-C stays what it is.
    * What it changes in the process (`vipo.foreign.settings`: threads, dtypes, determinism, random numbers,
      environment, working directory, signal handlers, ...) is put back. At its next call the same module finds what it
      had set, as if it had the process to itself. What is the caller's (gradients, autocast, signals) it never keeps.
    * What it prints goes to standard error: standard output is for results.

    Not caught: ``os._exit``, a crash in native code, and functions of a library that it replaces.

    Args:
        kind: type of the error.
        what: names the part and begins the message, such as ``reward 'my_rewards:brightness'``.
        path: import path of the part; a name without a colon has none, and keeps nothing between calls.

    Raises:
        VipoError: of type `kind`; its `foreign` tells whether the cause's traceback is worth keeping.
    """

    def __init__(self, kind: type[VipoError], what: str, path: str) -> None:
        self._kind, self._what = kind, what
        module, colon, _ = path.partition(":")
        self._module = module if colon else ""
        self._before: dict[str, Any] = {}
        self._own = _Own()
        self._nested = False

    def __enter__(self) -> None:
        from vipo.foreign.settings import SETTINGS

        self._own = self._owned() or self._own
        self._nested = self._own.inside
        if self._nested:
            return
        self._own.inside = True
        self._before = {name: setting.read() for name, setting in SETTINGS.items()}
        for name, value in self._own.values.items():
            _write(name, _merged(self._before[name], value))
        sys.stdout = sys.stderr

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> Literal[False]:
        if self._nested:
            return False
        self._own.inside = False
        left = self._put_back()
        if error is None and left:
            raise self._kind(f"{self._what} changed {', '.join(left)}, and that cannot be put back; let it put it back")
        if error is None or isinstance(error, KeyboardInterrupt) or self._tells(error):
            return False
        told = self._kind(f"{self._what} raised {type(error).__name__}: {_said(error)}")
        # What a part says with an error of ours is all that there is to say.
        told.foreign = not isinstance(error, VipoError)
        raise told from error

    def _tells(self, error: BaseException) -> bool:
        return isinstance(error, self._kind) and str(error).startswith(self._what)

    def _owned(self) -> _Own | None:
        module = sys.modules.get(self._module)
        if not isinstance(module, ModuleType):
            return None
        own: _Own = vars(module).setdefault(_OWN, self._own)
        return own

    def _put_back(self) -> list[str]:
        from vipo.foreign.settings import SETTINGS

        left = []
        for name, setting in SETTINGS.items():
            before, after = self._before[name], setting.read()
            if after == before:
                continue
            if setting.own:
                self._own.values[name] = _change(before, after)
            if setting.write is None or not _write(name, before):
                left.append(name)
        # An import that has just made the module.
        self._owned()
        return left


def _write(name: str, value: Any) -> bool:
    from vipo.foreign.settings import SETTINGS

    write = SETTINGS[name].write
    assert write is not None
    try:
        write(value)
    except (OSError, RuntimeError, ValueError, TypeError):
        return False
    return True


def _change(before: Any, after: Any) -> Any:
    """Of a mapping, the keys that changed (None: gone), so that what others change meanwhile stays; else the value."""
    if not isinstance(before, dict):
        return after
    return {key: after.get(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def _merged(now: Any, change: Any) -> Any:
    if not isinstance(now, dict):
        return change
    return {key: value for key, value in (now | change).items() if value is not None}


def _said(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        return "(its message cannot be shown)"
    return one_line(text, _LONGEST_CAUSE)
