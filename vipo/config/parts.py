"""Sections that choose a part by `name`: a registered one, with a section of its own, or an import path.

A part's options stand beside its name. A registered part's are a section; an import path's are known to the part alone,
which checks them where import paths are tried (`vipo.parts`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, WrapValidator, field_validator, model_validator

from vipo.config.registries import registered
from vipo.config.section import Section, check_saved
from vipo.foreign.paths import IMPORT_PATH


class ImportedPart(Section):
    """A part that an import path names; what stands beside the name are its options."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    known: ClassVar[Mapping[str, str]]
    kind: ClassVar[str]

    name: str = Field(description="Import path.", json_schema_extra={"pattern": rf"^{IMPORT_PATH}$"})

    @field_validator("name")
    @classmethod
    def _named(cls, value: str) -> str:
        return registered(value, cls.known, cls.kind)

    @model_validator(mode="after")
    def _plain(self) -> Self:
        check_saved(self.options)
        return self

    @property
    def options(self) -> dict[str, JsonValue]:
        """All but the name, as they were given."""
        return dict(self.__pydantic_extra__)


def chosen(sections: Sequence[type[BaseModel]], value: Any) -> type[BaseModel]:
    """The section whose name `value` has; without a name the first, with another one the last, the import path's."""
    if not isinstance(value, Mapping) or "name" not in value:
        return sections[0]
    return next((section for section in sections if value["name"] in _names(section)), sections[-1])


def by_name(*sections: type[BaseModel]) -> WrapValidator:
    """Validates a mapping by the section that its `name` chooses, so that what is wrong names that one's keys."""

    def validate(value: Any, handler: Any) -> Any:
        if not isinstance(value, BaseModel | Mapping):
            known = _names(sections[0])[0]
            raise ValueError(f"expected a mapping such as {{name: {known}}}, got {value!r}; or leave it out")
        return handler(value) if isinstance(value, BaseModel) else chosen(sections, value).model_validate(value)

    return WrapValidator(validate)


def _names(section: type[BaseModel]) -> tuple[Any, ...]:
    field = section.model_fields.get("name")
    return () if field is None else get_args(field.annotation)
