"""A judge: a model behind an OpenAI-compatible endpoint that is asked about each picture."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from vipo.config.reward_judge import JudgeOptions
from vipo.prompts.needs import own_questions
from vipo.rewards.ahead import Ahead, key_of
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import eight_bit
from vipo.rewards.wire import Endpoint, encoded, finite_number

_MOST_OF_TOKEN = 2**14
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_Call = tuple[bytes, "partial[float]"]


def _word(text: str) -> str:
    word = text.strip().lower()
    return str(_COUNTED.index(word)) if word in _COUNTED else word


class Judge:
    """How likely the right answers are, by the endpoint's own log-probabilities, or the number that it writes.

    A question's likelihood is the sum over the first word's alternatives that are the answer, whatever their case and
    blanks; a number up to ten may be a word or a figure. Sampling is off: temperature 0, one answer, a fixed seed;
    whether an endpoint then repeats itself is its own matter.

    Source: soft questions as of GenEval2 (Kamath et al., arXiv 2512.16853), over atoms by `combine`; a written score as
    of UnifiedReward (Wang et al., arXiv 2503.05236).

    Args:
        device: unused, the endpoint computes.
        options: section of the term.

    Raises:
        RewardError: the endpoint cannot be reached, or does not serve the model.
    """

    Options = JudgeOptions

    def __init__(self, device: str, options: JudgeOptions) -> None:
        self._options = options
        self._endpoint = Endpoint(options.url, options, f"judge {options.model!r}")
        self.identity = self._served()
        self._ahead: Ahead[float] = Ahead(options.concurrency)

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Ask about what will be scored, and return at once."""
        for calls in self._calls(images, prompts, metadata):
            for key, call in calls:
                self._ahead.begin(key, call)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores ``(B,)`` of pictures ``(B, 3, H, W)`` or clips ``(B, T, 3, H, W)`` in [0, 1].

        Raises:
            RewardError: no answer, one that cannot be read, or a prompt has no questions.
        """
        calls = list(self._calls(images, prompts, metadata))
        values = iter(self._ahead.answers(call for sample in calls for call in sample))
        return torch.tensor([self._combined([next(values) for _ in sample]) for sample in calls], dtype=torch.float64)

    def _combined(self, values: list[float]) -> float:
        if self._options.combine == "geometric":
            return 0.0 if min(values) <= 0 else math.exp(sum(map(math.log, values)) / len(values))
        return sum(values) / len(values)

    def _calls(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Iterator[list[_Call]]:
        """Of each sample, its questions."""
        clips = images if images.ndim == 5 else images[:, None]
        places = torch.linspace(0, clips.shape[1] - 1, min(self._options.frames, clips.shape[1])).round().long()
        for clip, prompt, row in zip(clips, prompts, metadata, strict=True):
            pixels = eight_bit(clip[places.to(clip.device)])
            yield [
                (key_of(pixels, question, answer), partial(self._ask, pixels, question, answer))
                for question, answer in self._questions(prompt, row)
            ]

    def _questions(self, prompt: str, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        key = self._options.key
        if key is None:
            return [(self._options.question.replace("{}", prompt), "yes")]
        pairs = own_questions(row, key)
        if pairs is None:
            raise RewardError(
                f"metadata {key!r} of {prompt[:80]!r}: expected a list of questions, or of pairs of question and answer"
            )
        return [(self._options.each.replace("{}", question), answer) for question, answer in pairs]

    def _ask(self, frames: Any, question: str, answer: str) -> float:
        options = self._options
        urls = [f"data:image/png;base64,{encoded(frame)}" for frame in frames]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        request = {
            "model": options.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "temperature": 0.0,
            "top_p": 1.0,
            "n": 1,
            "seed": options.seed,
            "max_tokens": options.tokens,
        }
        if options.reads == "answer":
            request |= {"logprobs": True, "top_logprobs": options.alternatives}
        most = 2**16 + _MOST_OF_TOKEN * options.tokens * (options.alternatives if options.reads == "answer" else 1)
        found = self._endpoint.ask("/chat/completions", request, most)
        try:
            choice = found["choices"][0]
            if options.reads == "number":
                return self._written(choice["message"]["content"])
            return self._likelihood(choice["logprobs"]["content"][0]["top_logprobs"], answer)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            self._refuse(
                f"the answer is no chat completion{' with logprobs' * (options.reads == 'answer')} ({error!r})"
            )

    def _likelihood(self, alternatives: Any, answer: str) -> float:
        total = 0.0
        for alternative in alternatives:
            told = finite_number(alternative["logprob"])
            if told is None or told > 1e-3:
                self._refuse(f"{str(alternative['logprob'])[:80]!r} is no log-probability")
            if _word(alternative["token"]) == _word(answer):
                total += math.exp(told)
        return min(total, 1.0)

    def _written(self, text: Any) -> float:
        numbers = _NUMBER.findall(text)
        value = finite_number(float(numbers[-1])) if numbers else None
        # A judge that writes none has no score for this sample, which is then left out and counted.
        return math.nan if value is None else value

    def _served(self) -> dict[str, Any]:
        listed = self._endpoint.ask("/models", None, 2**22).get("data")
        models = [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        own = next((model for model in models if model.get("id") == self._options.model), None)
        if own is None:
            names = ", ".join(str(model.get("id"))[:80] for model in models[:5]) or "none"
            self._refuse(f"does not serve that model; it serves {names}")
        # The time when it was started tells nothing of the model.
        told = {name: own[name] for name in ("id", "root", "parent", "owned_by", "max_model_len") if name in own}
        return {"reward": "judge", "model": told}

    def _refuse(self, why: str) -> NoReturn:
        raise RewardError(f"{self._endpoint.called}: {why}")
