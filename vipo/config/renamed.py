"""Keys of earlier versions and others that one may look for, and where what they say is said (CHANGELOG.md)."""

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
        "prompts.train": "prompts.source, which trains whole where prompts.eval names a source of its own",
    }
)
"""New words by old key."""
