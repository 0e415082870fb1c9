"""Section `experiment`: its arms, and the study that it belongs to."""

import re
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from vipo.config.meter import MeterConfig
from vipo.config.published import PublishedConfig
from vipo.config.registered import RegisteredConfig
from vipo.config.section import LONGEST_NAME, MOST_RUNS, Section, Seed

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*\Z")
_ARM = re.compile(r"[a-z0-9][a-z0-9_]*(\.[0-9]+)?\Z")


def check_arm_name(name: str) -> str:
    """Give back the name of an arm, which folders and files are named by.

    Raises:
        ValueError: it is not lower-case letters, digits and underscores, with a decimal at most at its end.
    """
    if _ARM.match(name) and len(name) <= LONGEST_NAME:
        return name
    raise ValueError(
        f"arm {name[:LONGEST_NAME]!r} must be lower-case letters, digits and underscores, at most {LONGEST_NAME}; a "
        "decimal may end it (sigma0.5)"
    )


class ArmConfig(Section):
    """One arm of an experiment."""

    base: Annotated[str, AfterValidator(check_arm_name)] | None = Field(
        None, description="File of configs/arm that the arm starts from; null: its own name's."
    )
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, strict=False)
    overrides: tuple[str, ...] = Field((), strict=False, description="Hydra overrides that hold for this arm alone.")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"a seed is named twice: {list(value)}")
        return value


class StudyConfig(Section):
    """What a study decides, fixed before it runs: which candidate may replace the reference, by one metric."""

    metric: str = Field(description="Score column that decides, such as reward/object_redness.")
    matched_on: str = Field(description="Score column that is held equal for it, such as change/total.")
    reference: str = Field(description="The arm that candidates are compared with.")
    candidates: tuple[str, ...] = Field(min_length=1, strict=False)
    choose_seeds: tuple[Seed, ...] = Field(min_length=2, strict=False, description="Seeds that choose the candidate.")
    confirm_seeds: tuple[Seed, ...] = Field(min_length=2, strict=False, description="Fresh seeds that confirm it.")

    @model_validator(mode="after")
    def _fresh(self) -> Self:
        if shared := set(self.choose_seeds) & set(self.confirm_seeds):
            raise ValueError(f"confirm_seeds must be fresh: {sorted(shared)} also chose")
        return self


class ExperimentConfig(Section):
    """The unit of science: arms x seeds on one generator, prompt set and reward."""

    name: str
    title: str
    question: str = Field(description="What the experiment asks, in a sentence for the report.")
    arms: dict[str, ArmConfig] = Field(min_length=1)
    study: StudyConfig | None = Field(None, description="The decision that the experiment was run for, if any.")
    meter: MeterConfig | None = Field(None, description="What `vipo credit` measures; null: its defaults.")
    published: PublishedConfig | None = Field(None, description="A table of others that `vipo published` shows beside.")
    registered: RegisteredConfig | None = Field(
        None, description="Measures and rule that were fixed before the runs, for `vipo registered`."
    )

    @model_validator(mode="after")
    def _published_has_its_arms(self) -> Self:
        absent = [] if self.published is None else sorted(self.published.rows.keys() - self.arms.keys())
        if absent:
            raise ValueError(f"published.rows: {', '.join(absent)}: no such arm; name it in experiment.arms too")
        return self

    @model_validator(mode="after")
    def _study_has_its_runs(self) -> Self:
        if self.study is not None:
            seeds = {*self.study.choose_seeds, *self.study.confirm_seeds}
            for name in (self.study.reference, *self.study.candidates):
                absent = seeds - set(self.arms[name].seeds if name in self.arms else ())
                if absent:
                    raise ValueError(f"study: arm {name!r} lacks the seeds {sorted(absent)}")
        return self

    @model_validator(mode="after")
    def _registered_has_its_runs(self) -> Self:
        if self.registered is not None:
            self.registered.check_arms({name: arm.seeds for name, arm in self.arms.items()})
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not(self, dump: SerializerFunctionWrapHandler) -> Any:
        data = dump(self)
        for name in ("published", "registered"):
            if getattr(self, name) is None:
                del data[name]
        return data

    @field_validator("meter")
    @classmethod
    def _of_arms(cls, value: MeterConfig | None) -> MeterConfig | None:
        for name in () if value is None else value.arms:
            check_arm_name(name)
        return value

    @field_validator("arms")
    @classmethod
    def _with_base(cls, value: dict[str, ArmConfig]) -> dict[str, ArmConfig]:
        if "base" not in value:
            raise ValueError(f"{list(value)} lacks 'base', the generator as it is, which every arm is compared with")
        for name in value:
            check_arm_name(name)
        runs = sum(len(arm.seeds) for arm in value.values())
        if runs > MOST_RUNS:
            raise ValueError(
                f"{len(value)} arms with their seeds are {runs} runs, more than the {MOST_RUNS} of an experiment; name "
                "fewer seeds"
            )
        return value

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        if not _NAME.match(value) or len(value) > LONGEST_NAME:
            raise ValueError(
                f"{value[:LONGEST_NAME]!r} must be lower-case letters, digits and underscores, at most "
                f"{LONGEST_NAME}: it names a folder"
            )
        return value
