"""Section `experiment.registered`: what docs/registered.md fixes in words, for `vipo registered`."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from vipo.config.section import Section

#: Arms, each with the arm that it is compared with.
Pairs = dict[str, str]


class RegisteredConfig(Section):
    """Measures and rule of an experiment, written and committed before its first run."""

    reward: str = Field(description="Score column whose area under the held-out curve is measured.")
    change: str = Field("change/total", description="Score column that is held equal for the second measure.")
    families: dict[str, Annotated[Pairs, Field(min_length=1)]] = Field(
        min_length=1,
        description="The tests that decide: candidates with their references; Holm's correction within each family.",
    )
    controls: Pairs = Field(
        {}, description="Arms with their references that must not pass the test themselves, or no candidate does."
    )
    told: Pairs = Field({}, description="Arms with their references that are told and decide nothing.")
    side_effects: tuple[str, ...] = Field((), strict=False, description="Score columns that are told beside.")

    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """Role (the family's name, ``control``, ``told``), arm and reference of every comparison."""
        for role, pairs in {**self.families, "control": self.controls, "told": self.told}.items():
            for arm, reference in pairs.items():
                yield role, arm, reference

    def check_arms(self, seeds: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse comparisons that the experiment's arms do not allow.

        Raises:
            ValueError: an arm is not there, or not with its reference's seeds (two or more).
        """
        for _, arm, reference in self.pairs():
            if absent := [name for name in (arm, reference) if name not in seeds]:
                raise ValueError(f"registered: {', '.join(absent)}: no such arm; name it in experiment.arms too")
            if set(seeds[arm]) != set(seeds[reference]) or len(seeds[arm]) < 2:
                raise ValueError(f"registered: {arm!r} and {reference!r} are paired by seed; give both the same")

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        if taken := self.families.keys() & {"control", "told"}:
            raise ValueError(f"families: {', '.join(sorted(taken))}: the roles of other arms; choose another name")
        return self
