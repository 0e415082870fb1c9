"""What a user gives the workflow with ``snakemake --config``: the experiment, its overrides, and a word of consent."""

import difflib
from collections.abc import Mapping
from typing import Any

from vipo.config.validation import ConfigError

_KEYS = ("experiment", "overrides", "set_aside")
# What the workflow says itself of every run.
_OF_A_RUN = ("arm", "seed")
_CLOSES = {"[": "]", "{": "}", "(": ")"}


def read_workflow_config(given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The experiment's name (default: demo) and the Hydra overrides.

    Overrides are a list of texts, or one text: YAML does not read ``[training.save_at=[2,4]]`` as a list, because of
    the brackets within, and Snakemake hands it over as it was written.

    Raises:
        ConfigError: another key, overrides that are no list, or one of them that is no text or has no effect.
    """
    for key in given:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--config {key}: unknown key{meant}; allowed: {', '.join(_KEYS)}")
    found = given.get("overrides")
    if isinstance(found, str):
        found = _split(found)
    if not isinstance(found, list | tuple | None):
        raise ConfigError(f"--config overrides: {found!r} is no list; write overrides='[key=value,key=value]'")
    for item in found or ():
        if not isinstance(item, str):
            raise ConfigError(
                f"--config overrides: {item!r} is no text key=value; put it in quotes: overrides='[\"key=value\"]'"
            )
        if item.partition("=")[0].strip().lstrip("+") in _OF_A_RUN:
            raise ConfigError(
                f"--config overrides: {item!r}: has no effect, for the workflow runs every arm and seed of the "
                "experiment; choose them with experiment.arms.ARM.seeds=[...] and '~experiment.arms.ARM'"
            )
    return str(given.get("experiment", "demo")), list(found or ())


def _split(text: str) -> list[str]:
    """The items of ``[a=[1,2],b={c: 3}]``; a text without brackets is one. Quotes around a whole item are YAML's."""
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]")):
        return [inner] if inner else []
    items, start, open_brackets, quote = [], 1, [], ""
    for place, sign in enumerate(inner[1:-1], 1):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in _CLOSES:
            open_brackets.append(_CLOSES[sign])
        elif sign in _CLOSES.values():
            if not open_brackets or open_brackets.pop() != sign:
                raise ConfigError(f"--config overrides: {text!r}: {sign!r} at {place + 1} closes nothing")
        elif sign == "," and not open_brackets:
            items.append(inner[start:place])
            start = place + 1
    if open_brackets or quote:
        raise ConfigError(f"--config overrides: {text!r}: {quote or open_brackets[-1]!r} is missing")
    items.append(inner[start:-1])
    return [_unquoted(item.strip()) for item in items if item.strip()]


def _unquoted(item: str) -> str:
    whole = len(item) > 1 and item[0] in "'\"" and item[-1] == item[0] and item[0] not in item[1:-1]
    return item[1:-1] if whole else item
