"""Choices that came after results were there."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_BEFORE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "advantages": {"combine": "advantages"},
        "generator": {"attention": "default", "compile": "none", "decoding": "whole", "file_2": None},
        "objective.gate": {"range_above": None},
        "optimizer": {"fused": True},
        "perception": {"precision": "fp32"},
        "training": {"base_distance": False, "joined_transitions": 1},
        "training.lora": {"init": "uniform"},
        "sampling.window": {"shared_start": False, "solver": "euler", "within": None},
    }
)
"""Keys by section, and as what everything was before there was a choice."""


def without_later_choices(identity: dict[str, Any]) -> dict[str, Any]:
    """What decides a result, without the keys that were added later and are as everything was before them.

    What was trained before there was a choice keeps its identity, and so what is evaluated of it.

    Args:
        identity: sections by name, as JSON, all or some; it is changed.
    """
    for section, keys in _BEFORE.items():
        found = identity
        for name in section.split("."):
            found = found.get(name) or {}
        for key, before in keys.items():
            if key in found and found[key] == before:
                del found[key]
    return identity
