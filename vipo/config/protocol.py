"""Section `protocol`: an evaluation pinned by name, so that two numbers of one protocol can be compared."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, JsonValue, model_validator

from vipo.config.section import LONGEST_NAME, PositiveInt, Section
from vipo.config.values import config_hash


class ProtocolConfig(Section):
    """What a named evaluation fixes; a configuration that says otherwise is an error, not another protocol."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=LONGEST_NAME)
    version: PositiveInt = Field(description="Counts up with every change of what is pinned.")
    pins: dict[str, JsonValue] = Field(description="Values by section and key that must hold.")
    judge: str | None = Field(None, description="The reward that must be among evaluation.rewards; null: any.")
    judge_options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Of its options, those that its scores depend on, by name."
    )

    @model_validator(mode="after")
    def _of_a_judge(self) -> Self:
        if self.judge_options and self.judge is None:
            raise ValueError("judge_options without judge: name the reward whose options they are")
        return self

    @property
    def sha256(self) -> str:
        """Of everything that the protocol says."""
        # One without them keeps the hash that it had before there were any.
        return config_hash(self.model_dump(mode="json", exclude=set() if self.judge_options else {"judge_options"}))

    @property
    def title(self) -> str:
        """As it stands in every table: ``geneval2 v1 (0123456789ab)``."""
        return f"{self.name} v{self.version} ({self.sha256[:12]})"

    def broken(self, values: Mapping[str, Any]) -> list[str]:
        """What of a configuration, as JSON, is not as pinned: ``key wanted, is value``."""
        found = [f"{key} {wanted!r}, is {value!r}" for key, wanted, value in _differing("", self.pins, values)]
        found += _fewer(values["prompts"])
        # A reward without arguments is saved as its name alone.
        rewards = values["evaluation"]["rewards"]
        judges: list[Mapping[str, Any]] = [{"name": r} if isinstance(r, str) else r for r in rewards]
        if self.judge is None:
            return found
        own = [judge.get("options", {}) for judge in judges if judge["name"] == self.judge]
        if not own:
            return [*found, f"evaluation.rewards {self.judge!r}, are {[judge['name'] for judge in judges]!r}"]
        wrong = [_differing("", self.judge_options, options) for options in own]
        if all(wrong):
            found += [f"options.{key} of {self.judge!r} {wanted!r}, is {value!r}" for key, wanted, value in wrong[0]]
        return found


def _fewer(prompts: Mapping[str, Any]) -> list[str]:
    """What leaves out prompts of a pinned set: what is measured on the rest is not that protocol."""
    own = prompts["eval"] or {}
    dropping = {f"prompts.filters.{name}": value for name, value in prompts["filters"].items() if value is not None}
    dropping |= {"prompts.eval.categories": own["categories"]} if own.get("categories") else {}
    dropping |= {"prompts.ignore_case": True} if prompts["ignore_case"] else {}
    return [f"every prompt of its set, and {key} {value!r} leaves some out" for key, value in dropping.items()]


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
