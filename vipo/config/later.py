"""Choices that came after results were there."""

from typing import Any


def without_later_choices(identity: dict[str, Any]) -> dict[str, Any]:
    """What decides a training, without the keys that were added later and are as everything was before them.

    What was trained before there was a choice keeps its identity, and so what is evaluated of it.

    Args:
        identity: sections by name, as JSON; it is changed.
    """
    window = identity["sampling"]["window"] or {}
    for section, key, before in ((identity["training"], "joined_transitions", 1), (window, "solver", "euler")):
        if section.get(key) == before:
            del section[key]
    return identity
