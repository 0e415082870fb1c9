"""What every section of the configuration is made of: types with bounds, and the base that refuses unknown keys.

Every number that decides a result is a field of a section. Values that need a model to be checked (component count
against feature width, grid sizes) are checked when a run is set up.
"""

import json
import os
import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_SURROGATE = re.compile("[\ud800-\udfff]")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")

# Of an experiment or arm: what is appended to it must still name a file.
LONGEST_NAME = 100

# No number is unbounded: what no machine would ever finish, or no format holds, is refused before anything starts.
LARGEST_INT = 2**31 - 1
MOST_SAMPLES = 2**16
"""Of an update: ``prompts_per_update * group_size``."""

MOST_EVALUATED = 10**6
"""Pictures that one set of weights is evaluated on: ``prompts * samples_per_prompt``."""

MOST_CALLS = 10**9
"""Evaluations of the network (of one sample at one step) of a run's training, or of an evaluation."""

MOST_RUNS = 2**12
"""Of an experiment: each is composed before any starts."""

MOST_PIXELS = 2**28
"""Of one sample, all frames together."""

DEVICE = r"^(cpu|cuda(:(0|[1-9][0-9]?))?)$"
"""Names of devices, as a pattern."""

PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def _at_home(value: str) -> str:
    if not value.startswith("~"):
        return value
    # Not Path.expanduser, which would also normalise what follows.
    expanded = os.path.expanduser(value)  # noqa: PTH111
    if expanded.startswith("~"):
        raise ValueError(f"{value!r}: there is no user {value[1:].partition('/')[0]!r}; './~' names a folder '~'")
    return expanded


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"{value!r} holds a NUL character, which no path can")
    if len(value.encode()) > 4000 or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError(f"{value[:40]!r}… is longer than a path can be (255 bytes a name, 4000 in all)")
    return _at_home(value)


UserPath = Annotated[str, AfterValidator(_path)]
"""A path, or what may stand in its place; `~` and `~user` expanded: what is saved means the same to everybody."""


def _pinned(revision: str) -> str:
    if _COMMIT.match(revision):
        return revision
    raise ValueError(
        f"{revision!r} is no whole commit hash; a branch, a tag or a part of a hash may come to mean other weights. "
        "huggingface_hub.HfApi().model_info('OWNER/NAME').sha is the newest one's 40 hexadecimal digits"
    )


Commit = Annotated[str, AfterValidator(_pinned)]
"""The revision of a hub repository: a whole commit hash."""


def _with_prompt(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError(f"{text!r} must hold '{{}}' once, where the prompt goes")
    return text


WithPrompt = Annotated[str, AfterValidator(_with_prompt)]
"""A text in which {} stands for the prompt."""


def check_saved(options: Any) -> None:
    """Refuse options of a part, known to it alone, that no file can hold.

    Raises:
        ValueError: a number is not finite, or a text holds half a surrogate.
    """
    try:
        json.dumps(options, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise ValueError(f"an option cannot be saved ({error}); give finite numbers and whole characters") from error


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are immutable and never coerced from text."""

    # A tuple field lifts `strict` for itself alone: YAML and JSON have lists only.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _writable(cls, value: Any, info: ValidationInfo) -> Any:
        # Half a surrogate reads from YAML and JSON, and is found to be no text when the first file is written.
        left = [value]
        while left:
            item = left.pop()
            if isinstance(item, list | tuple):
                left += item
            elif isinstance(item, dict):
                # Sections look at their own fields, and name them.
                if not _holds_sections(cls.model_fields[str(info.field_name)].annotation):
                    left += [*item, *item.values()]
            elif isinstance(item, str) and _SURROGATE.search(item):
                raise ValueError(f"{item[:LONGEST_NAME]!r} holds half a surrogate, which no file can; leave it out")
        return value


def _holds_sections(annotation: Any) -> bool:
    """Whether an annotation names a model, in a mapping or tuple too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(_holds_sections(item) for item in get_args(annotation))
