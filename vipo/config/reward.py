"""Section `reward`, and what names a reward wherever one is named."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from vipo.config.registries import REWARDS, registered
from vipo.config.reward_options import REWARD_OPTIONS
from vipo.config.reward_process import ASKED, deciding
from vipo.config.section import LONGEST_NAME, Section, check_saved
from vipo.config.validation import ConfigError, validate_section

_LABEL = re.compile(rf"[A-Za-z0-9][\w.-]{{0,{LONGEST_NAME - 1}}}")


class RewardSpec(Section):
    """A reward with its arguments. A name alone, where a mapping could stand, is that reward without any."""

    name: str = Field(description="A registered reward or an import path 'package.module:object'.")
    label: str = Field(
        "", description="What its scores are called, reward/LABEL. Its name, if empty; two of one name need two."
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="The reward's own arguments (docs/rewards.md). A registered reward's defaults are filled in.",
    )
    frames: Annotated[int, Field(ge=1, le=2**14)] | None = Field(
        None,
        description="Of a reward of pictures, where clips are made: how many evenly spread frames of each it scores; "
        "theirs is the mean.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known_reward(cls, value: str) -> str:
        return registered(value, REWARDS, "reward")

    @field_validator("label")
    @classmethod
    def _own_label(cls, value: str, info: ValidationInfo) -> str:
        name: str = info.data.get("name", "")
        if value in ("", name):
            return name
        if not _LABEL.fullmatch(value):
            raise ValueError(
                f"{value!r} is no label: letters, digits, '_', '.' and '-', at most {LONGEST_NAME}, and the first a "
                "letter or a digit"
            )
        if value in REWARDS:
            raise ValueError(f"{value!r} is the name of another reward; choose another label")
        return value

    @field_validator("options")
    @classmethod
    def _own_options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name: str = info.data.get("name", "")
        check_saved(value)
        if name not in REWARDS:
            # Of an import path, whose own model checks them once it is imported.
            return value
        section = REWARD_OPTIONS.get(name)
        if section is None:
            if value:
                raise ValueError(f"{', '.join(value)}: reward {name!r} takes no options; leave them out")
            return value
        try:
            return validate_section(section, value).model_dump(mode="json")
        except ConfigError as error:
            raise ValueError("; ".join(str(error).splitlines())) from error

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, dump: SerializerFunctionWrapHandler) -> Any:
        data = dump(self)
        if self.label == self.name:
            del data["label"]
        if not self.options:
            del data["options"]
        if self.frames is None:
            del data["frames"]
        return data["name"] if list(data) == ["name"] else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(core)]}

    @property
    def title(self) -> str:
        """For people: its label, and what that stands for."""
        return self.label if self.label == self.name else f"{self.label} ({self.name})"

    @property
    def deciding(self) -> Any:
        """As it is saved, without the options that decide no score: where a process runs, and how it is asked."""
        if self.name not in ASKED:
            return self.model_dump(mode="json")
        return self.model_copy(update={"options": deciding(self.options)}).model_dump(mode="json")

    @property
    def identity(self) -> tuple[str, str, str, int | None]:
        """Name, label, options and frames: equal where two terms are the same measurement."""
        return self.name, self.label, json.dumps(self.options, sort_keys=True), self.frames


class RewardTerm(RewardSpec):
    """One reward of the weighted sum."""

    weight: float = Field(1.0, ge=-1e6, le=1e6, allow_inf_nan=False)

    @property
    def spec(self) -> RewardSpec:
        """The reward without its weight."""
        return RewardSpec(name=self.name, label=self.label, options=self.options, frames=self.frames)


class RewardConfig(Section):
    """What is optimised: rewards are normalised within each group, weighted and added."""

    terms: tuple[RewardTerm, ...] = Field(min_length=1, strict=False)

    @field_validator("terms")
    @classmethod
    def _distinct(cls, value: tuple[RewardTerm, ...]) -> tuple[RewardTerm, ...]:
        check_labels(value)
        if all(term.weight == 0 for term in value):
            raise ValueError("every weight is 0; at least one reward must count")
        return value


def check_labels(rewards: Sequence[RewardSpec]) -> None:
    """Refuse two rewards of one label.

    Raises:
        ValueError: the message tells both.
    """
    labels = [reward.label for reward in rewards]
    if len(set(labels)) != len(labels):
        raise ValueError(f"a reward is named twice: {', '.join(labels)}; leave one out, or give it a label of its own")


def referred(rewards: Any, terms: Sequence[RewardTerm] | None) -> Any:
    """A raw list of rewards in which the label of a term stands for that term, arguments included.

    Without terms, which did not validate, nothing is known of names that could be labels: they are left out.
    """
    if not isinstance(rewards, list | tuple):
        return rewards
    if terms is None:
        return [item for item in rewards if not isinstance(item, str) or item in REWARDS or ":" in item]
    known: Mapping[str, RewardSpec] = {term.label: term.spec for term in terms}
    return [known.get(item, item) if isinstance(item, str) else item for item in rewards]
