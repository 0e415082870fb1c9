"""Section `protocol`: an evaluation pinned by name, so that two numbers of one protocol can be compared."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, JsonValue

from vipo.config.section import LONGEST_NAME, PositiveInt, Section
from vipo.config.values import config_hash


class ProtocolConfig(Section):
    """What a named evaluation fixes; a configuration that says otherwise is an error, not another protocol."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=LONGEST_NAME)
    version: PositiveInt = Field(description="Counts up with every change of what is pinned.")
    pins: dict[str, JsonValue] = Field(description="Values by section and key that must hold.")
    judge: str | None = Field(None, description="The reward that must be among evaluation.rewards; null: any.")

    @property
    def sha256(self) -> str:
        """Of everything that the protocol says."""
        return config_hash(self.model_dump(mode="json"))

    @property
    def title(self) -> str:
        """As it stands in every table: ``geneval2 v1 (0123456789ab)``."""
        return f"{self.name} v{self.version} ({self.sha256[:12]})"

    def broken(self, values: Mapping[str, Any]) -> list[str]:
        """What of a configuration, as JSON, is not as pinned: ``key wanted, is value``."""
        found = [f"{key} {wanted!r}, is {value!r}" for key, wanted, value in _differing("", self.pins, values)]
        # A reward without arguments is saved as its name alone.
        judges = [reward if isinstance(reward, str) else reward["name"] for reward in values["evaluation"]["rewards"]]
        if self.judge is not None and self.judge not in judges:
            found.append(f"evaluation.rewards {self.judge!r}, are {judges!r}")
        return found


def _differing(place: str, wanted: Mapping[str, Any], values: Any) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for name, value in wanted.items():
        key = f"{place}.{name}" if place else name
        own = values.get(name) if isinstance(values, Mapping) else None
        if isinstance(value, Mapping):
            found += _differing(key, value, own)
        elif own != value:
            found.append((key, value, own))
    return found
