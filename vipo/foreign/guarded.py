"""A class of others whose methods run inside the boundary."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vipo.errors import VipoError
from vipo.foreign.boundary import foreign

Base = TypeVar("Base")


def guarded_class(found: type[Base], kind: type[VipoError], what: str, path: str, methods: Sequence[str]) -> type[Base]:
    """A subclass of `found` that runs its methods inside `foreign`; what is abstract stays so.

    A class method that gives an instance of `found` itself gives one of the subclass.

    Args:
        found: the class.
        kind, what, path: see `foreign`.
        methods: names of the methods, class methods and properties that are used from outside. A plain value in the
            place of a property stays one.

    Raises:
        VipoError: of type `kind`; the class refuses to be derived from.
    """
    abstract: frozenset[str] = getattr(found, "__abstractmethods__", frozenset())
    own = {
        name: _guarded(found, name, functools.partial(foreign, kind, what, path))
        for name in methods
        if name not in abstract
    }
    names = {"__module__": found.__module__, "__qualname__": found.__qualname__, "__doc__": found.__doc__}
    made: Any = type(found)
    # Its own __init_subclass__ runs.
    with foreign(kind, what, path):
        guarded: type[Base] = made(found.__name__, (found,), {**names, **own})
    return guarded


def _guarded(found: type, name: str, boundary: Callable[[], foreign]) -> Any:
    original: Any = next(vars(owner)[name] for owner in found.__mro__ if name in vars(owner))
    if isinstance(original, classmethod):

        @functools.wraps(original.__func__)
        def of_class(cls: Any, *arguments: Any, **options: Any) -> Any:
            with boundary():
                made = original.__func__(cls, *arguments, **options)
            if type(made) is found:
                made.__class__ = cls
            return made

        return classmethod(of_class)
    if isinstance(original, staticmethod):
        return staticmethod(_around(original.__func__, boundary))
    if isinstance(original, property):
        read: Any = original.fget
        return property(_around(read, boundary), doc=original.__doc__)
    return _around(original, boundary) if callable(original) else original


def _around(original: Callable[..., Any], boundary: Callable[[], foreign]) -> Callable[..., Any]:
    @functools.wraps(original)
    def within(*arguments: Any, **options: Any) -> Any:
        with boundary():
            return original(*arguments, **options)

    return within
