"""Plain data against a section, and what is wrong with it in words: key, value and what is allowed. Without Hydra."""

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from vipo.config.parts import chosen
from vipo.config.renamed import RENAMED
from vipo.errors import VipoError
from vipo.text import one_line

# More of a refused value is not shown.
_SHOWN = 200

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(VipoError):
    """A configuration that cannot be used; the message names the key, the value and what is allowed."""


def validate_section(model: type[Model], data: Any, prefix: str = "") -> Model:
    """Validate plain data against a section; `prefix` comes before the keys that errors name.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        # pydantic leaves out refused items, then finds the sequence too short: that is the same problem twice.
        refused = {problem["loc"][:-1] for problem in problems} | {problem["loc"][:-2] for problem in problems}
        told = [item for item in problems if item["type"] != "too_short" or item["loc"] not in refused]
        raise ConfigError("\n".join(_problem(model, data, item, prefix) for item in told)) from error


def _problem(model: type[BaseModel], data: Any, item: Any, prefix: str) -> str:
    key = one_line(prefix + ".".join(str(part) for part in item["loc"]), _SHOWN)
    if item["type"] == "extra_forbidden":
        if key in RENAMED:
            return f"{key}: is said elsewhere now, in {RENAMED[key]}"
        known = _keys_at(model, data, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        return f"{key}: unknown key; {hint}allowed: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{key}: missing; give it a value"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (got {_shortened(item['input'])})"


def _shortened(value: Any) -> str:
    try:
        return cut(repr(value))
    except ValueError:
        return "a number of thousands of digits"


def cut(text: str) -> str:
    """As much of a refused value as is shown."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… of {len(text)} characters"


def _keys_at(model: type[BaseModel], data: Any, location: Sequence[int | str]) -> list[str]:
    current: Any = model
    for part in location:
        section = _section(current, data)
        data = data[part]
        if section is not None:
            field = section.model_fields.get(str(part))
            current = None if field is None else field.annotation
        else:
            # A key of a mapping, or a place in a tuple: what they hold is the annotation's last argument but `...`.
            held = [item for item in _arguments(current) if item is not Ellipsis and item is not type(None)]
            current = held[-1] if held else None
    section = _section(current, data)
    return [] if section is None else sorted(section.model_fields)


def _section(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The section that an annotation names itself, in no mapping or tuple; of several, the one for this value."""
    found = _sections(annotation)
    return chosen(found, value) if found else None


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (dict, tuple, list):
        return []
    return [found for item in get_args(annotation) for found in _sections(item)]


def _arguments(annotation: Any) -> tuple[Any, ...]:
    """Of ``dict[str, X]`` and ``tuple[X, ...]`` their arguments, also where None is allowed beside them."""
    if get_origin(annotation) in (dict, tuple, list):
        return get_args(annotation)
    return next((found for item in get_args(annotation) if (found := _arguments(item))), ())
