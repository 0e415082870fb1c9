"""Options of the reward `judge`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from vipo.config.reward_process import RemoteOptions, checked_url
from vipo.config.section import WithPrompt, check_saved

_FIXED = frozenset({"model", "messages", "n", "stream"})


class JudgeOptions(RemoteOptions):
    """Of `judge`: a model behind an endpoint that speaks as OpenAI's chat completions do."""

    url: str = Field(description="Address up to what stands before /chat/completions: http://127.0.0.1:8000/v1.")
    model: str = Field(min_length=1, description="Name under which the endpoint serves the model.")
    question: WithPrompt = Field(
        'Does this picture show "{}"? Answer with one word, yes or no.',
        description="What is asked of a sample; {} is its prompt.",
    )
    key: str | None = Field(
        None,
        description="Of the prompt's metadata, the key of its own questions: texts, whose answer is yes, or pairs of a "
        "question and its answer. null: question alone is asked.",
    )
    each: WithPrompt = Field(
        "{} Answer in one word.", description="How each of the prompt's own questions is put; {} is the question."
    )
    reads: Literal["answer", "number"] = Field(
        "answer",
        description="answer: how likely the first word is the right one, by its log-probabilities; number: the last "
        "number of what is written.",
    )
    combine: Literal["mean", "geometric"] = Field(
        "mean", description="Of several questions: the mean (of atoms), or the geometric mean (of the whole prompt)."
    )
    alternatives: Annotated[int, Field(ge=1, le=100)] = Field(
        20, description="First words whose log-probabilities are asked for; what is not among them counts as 0."
    )
    tokens: Annotated[int, Field(ge=1, le=2**15)] = Field(1, description="Of an answer, at most.")
    request: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Added to the body of each request, by name, in the place of what stands there; null takes a name "
        "out of it.",
    )
    frames: Annotated[int, Field(ge=1, le=1000)] = Field(8, description="Of a clip, evenly spaced ones that are shown.")
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(0, description="Of the endpoint's sampler.")

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        return checked_url(value)

    @field_validator("request")
    @classmethod
    def _own(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_saved(value)
        if fixed := _FIXED & value.keys():
            raise ValueError(f"{', '.join(sorted(fixed))}: is not for request to set; an answer could not be read then")
        return value

    @model_validator(mode="after")
    def _means(self) -> Self:
        if self.reads == "number" and self.combine == "geometric":
            raise ValueError("combine geometric is of likelihoods; with reads number take mean")
        if self.reads == "number" and self.tokens == 1:
            raise ValueError("reads number needs as many tokens as an answer has; raise tokens")
        return self
