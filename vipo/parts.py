"""Parts that a section chooses by name (`vipo.config.parts`): their classes, with options checked by themselves."""

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vipo.config.parts import ImportedPart
from vipo.config.validation import ConfigError, validate_section
from vipo.errors import VipoError
from vipo.foreign import foreign, guarded_class, resolve


class NoOptions(BaseModel):
    """Of a part that has none."""

    model_config = ConfigDict(extra="forbid")


class Part:
    """Base of what a configuration names and then calls.

    A class of others that has options names their pydantic model in `Options`; `vipo.config.section.Section` is a
    good base of it. An instance has them, validated, in `options`.
    """

    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options


Kind = TypeVar("Kind", bound=Part)


def load_part(
    section: BaseModel,
    registry: Mapping[str, str],
    base: type[Kind],
    methods: Sequence[str],
    error: type[VipoError],
    what: str,
    key: str,
) -> Kind:
    """The part that a section chooses; code of others runs behind `vipo.foreign`.

    Args:
        section: a registered part's own, or an `ImportedPart`.
        registry: import paths by name.
        base: what the class must derive from.
        methods: those that are called from outside.
        error: raised for what is wrong with the part.
        what: its kind in messages, such as ``credit source``.
        key: where `section` stands in the configuration, for what is wrong with its options.

    Raises:
        ConfigError: an option is unknown or wrong; the message names its key.
        VipoError: of type `error`: the path cannot be imported, or is no class of that kind.
    """
    name = str(getattr(section, "name"))  # noqa: B009 (of every section of a part)
    if not isinstance(section, ImportedPart):
        shipped: type[Kind] = pkgutil.resolve_name(registry[name])
        return shipped(section)
    called = f"{what} {name!r}"
    found = resolve(name, error, called)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise error(f"{called}: is no class that derives from {base.__module__}.{base.__qualname__}")
    options = _validated(found.Options, section, key)
    with foreign(error, called, name):
        return guarded_class(found, error, called, name, methods)(options)


def told(value: object) -> str:
    """What a part gave, for messages: a tensor by type, shape and device, anything else by its kind."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    place = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"{value.dtype} of {tuple(value.shape)}{place}"


def _validated(model: type[BaseModel], section: ImportedPart, key: str) -> BaseModel:
    with foreign(ConfigError, key, section.name):
        return validate_section(model, section.options, f"{key}.")
