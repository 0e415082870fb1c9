"""Section `reward`."""

from pydantic import Field, field_validator

from vipo.config.registries import REWARDS, registered
from vipo.config.section import Section


class RewardTerm(Section):
    """One reward of the weighted sum."""

    name: str = Field(description="A registered reward or an import path 'package.module:object'.")
    weight: float = Field(1.0, ge=-1e6, le=1e6, allow_inf_nan=False)

    @field_validator("name")
    @classmethod
    def _known_reward(cls, value: str) -> str:
        return registered(value, REWARDS, "reward")


class RewardConfig(Section):
    """What is optimised: rewards are normalised within each group, weighted and added."""

    terms: tuple[RewardTerm, ...] = Field(min_length=1, strict=False)

    @field_validator("terms")
    @classmethod
    def _distinct(cls, value: tuple[RewardTerm, ...]) -> tuple[RewardTerm, ...]:
        names = [term.name for term in value]
        if len(set(names)) != len(names):
            raise ValueError(f"a reward is named twice: {', '.join(names)}")
        if all(term.weight == 0 for term in value):
            raise ValueError("every weight is 0; at least one reward must count")
        return value
