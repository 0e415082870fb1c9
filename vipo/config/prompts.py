"""Section `prompts`."""

from typing import Annotated

from pydantic import Field

from vipo.config.section import PositiveInt, Section, UserPath


class PromptsConfig(Section):
    """Where prompts come from and how they are split."""

    source: UserPath = Field(
        description="txt, jsonl, csv or parquet file of at most 512 MiB, or an import path 'package.module:object'; "
        "relative paths start at the repository root."
    )
    text_key: str = Field("prompt", description="Column or key that holds the prompt (jsonl, csv, parquet).")
    eval_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="Share of prompts held out, decided by each prompt's own hash."
    )
    max_characters: PositiveInt = Field(2000, description="Longer prompts are dropped and counted.")
    ignore_case: bool = Field(
        False, description="Drop and count a prompt that differs from an earlier one in letter case alone."
    )
