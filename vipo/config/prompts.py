"""Section `prompts`."""

import re
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from vipo.config.section import PositiveInt, Section, UserPath
from vipo.foreign import is_import_path


def is_published(source: str) -> bool:
    """Whether a source is fetched: ``set:NAME`` or ``hub:OWNER/NAME@COMMIT/PATH``."""
    return source.startswith(("set:", "hub:"))


def is_called(source: str) -> bool:
    """Whether a source is a callable, by its import path; the name of a published set has the same form."""
    return is_import_path(source) and not is_published(source)


class FilterConfig(Section):
    """What else drops a prompt; each is counted in the manifest. The defaults drop nothing."""

    max_tokens: PositiveInt | None = Field(
        None, description="Of the generator's own tokenizers, the largest count, special tokens included."
    )
    script: str | None = Field(
        None,
        description="Script that nine of ten letters must be of, by their Unicode names: LATIN, CYRILLIC, CJK, ...",
    )
    blocklist: UserPath | None = Field(
        None,
        description="Text file of words and phrases, one a line; a prompt that holds one is dropped.",
    )

    @field_validator("script")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch("[A-Z]+", value):
            raise ValueError(f"{value!r} is no script's name in Unicode, such as LATIN, CYRILLIC or CJK")
        return value


class HeldOutSource(Section):
    """A source of its own for the held-out prompts."""

    source: UserPath = Field(description="As prompts.source.")
    text_key: str = Field("prompt", description="Column or key that holds the prompt.")
    categories: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Only rows with a `category` of these: rewards that read facts need them of every prompt. "
        "Empty: all.",
    )


class PromptsConfig(Section):
    """Where prompts come from and how they are split."""

    source: UserPath = Field(
        description="txt, tsv, json, jsonl, csv or parquet file of at most 512 MiB, an import path "
        "'package.module:object', a published set 'set:NAME', or a file of a Hugging Face dataset "
        "'hub:OWNER/NAME@COMMIT/PATH'; relative paths start at the repository root."
    )
    text_key: str = Field("prompt", description="Column or key that holds the prompt (all but txt).")
    eval_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="Share of prompts held out, decided by each prompt's own hash; not read where `eval` is given."
    )
    max_characters: PositiveInt = Field(2000, description="Longer prompts are dropped and counted.")
    ignore_case: bool = Field(
        False, description="Drop and count a prompt that differs from an earlier one in letter case alone."
    )
    eval: HeldOutSource | None = Field(
        None,
        description="Where the held-out prompts come from; `source` then trains whole, without those that are held "
        "out. null: a share of `source` is held out.",
    )
    filters: FilterConfig = FilterConfig()

    @model_validator(mode="after")
    def _two(self) -> Self:
        if self.eval is not None and (self.eval.source, self.eval.text_key) == (self.source, self.text_key):
            raise ValueError("eval.source is source itself: leave eval out and hold out a share (eval_share)")
        return self

    @property
    def holds_out(self) -> bool:
        """Whether any prompt is held out."""
        return self.eval is not None or self.eval_share > 0

    @property
    def sources(self) -> dict[str, str]:
        """Sources that are read, by the key that names them."""
        return {"source": self.source} | ({} if self.eval is None else {"eval.source": self.eval.source})

    def identity(self) -> dict[str, Any]:
        """What decides the prepared prompts; what is left at its default is not named."""
        found = self.model_dump(mode="json", exclude={"eval", "filters"})
        if self.eval is not None:
            found["eval"] = self.eval.model_dump(mode="json")
        if self.filters != FilterConfig():
            found["filters"] = self.filters.model_dump(mode="json")
        return found
