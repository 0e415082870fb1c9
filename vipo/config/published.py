"""Section `experiment.published`: a table of others that an experiment is to fill again."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from vipo.config.section import Section

_Value = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]


class PublishedColumn(Section):
    """One column of the table."""

    title: str = Field(description="As the publication calls it.")
    metric: str = Field(
        description="Score column of ours, such as reward/hpsv2; or vbench/quality, vbench/semantic, vbench/total."
    )
    domain: Literal["in", "out"] = Field(description="in: what was trained; out: what was not.")


class PublishedRow(Section):
    """One row: an arm of ours, and its numbers in the publication."""

    title: str = Field(description="As the publication calls it.")
    values: tuple[_Value | None, ...] = Field(strict=False, description="One a column; null: not published.")


class PublishedConfig(Section):
    """Published numbers by arm, as they were printed."""

    source: str = Field(description="Where they are from.")
    columns: tuple[PublishedColumn, ...] = Field(min_length=1, strict=False)
    rows: dict[str, PublishedRow] = Field(min_length=1, description="By the arm that is to give them again.")

    @field_validator("columns")
    @classmethod
    def _distinct(cls, value: tuple[PublishedColumn, ...]) -> tuple[PublishedColumn, ...]:
        metrics = [column.metric for column in value]
        if len(set(metrics)) != len(metrics):
            raise ValueError(f"a metric is named twice: {', '.join(metrics)}")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for arm, row in self.rows.items():
            if len(row.values) != len(self.columns):
                raise ValueError(f"rows.{arm}: {len(row.values)} values for {len(self.columns)} columns")
        return self
