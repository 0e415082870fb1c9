"""Keys of earlier versions, and where what they said is said now (the table of CHANGELOG.md)."""

from collections.abc import Mapping
from types import MappingProxyType

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "objective.map": "credit.sources and credit.control; psm is credit.sources=[{name: backbone}], none is []",
        "objective.map_on": "credit.multiplies",
        "objective.clip": "objective.gate; its side is objective.gate.name",
        "objective.advantage_clip": "advantages.clip",
        "objective.std": "advantages.std",
        "objective.std_floor": "advantages.std_floor",
    }
)
"""New words by old key."""
