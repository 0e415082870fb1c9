"""A judge: a model behind an OpenAI-compatible endpoint that is asked about each picture."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from vipo.config.reward_judge import JudgeOptions
from vipo.prompts.needs import own_questions
from vipo.rewards.ahead import Ahead, key_of
from vipo.rewards.completion import Read, is_either, likelihood, written
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import eight_bit
from vipo.rewards.wire import AGAIN, Endpoint, encoded

log = logging.getLogger(__name__)

_MOST_OF_TOKEN = 2**14
# Answers of one kind, none of which can be read, until the judge is taken for one that does not give them.
_PATIENCE = 8
# And of all kinds, where the answers are words of any number.
_PATIENCE_OF_ALL = 64

_Call = tuple[bytes, "partial[Read]"]


class Judge:
    """How likely the right answers are, by the endpoint's own log-probabilities, or the number that it writes.

    A question's likelihood is the sum over the first word's alternatives that are the answer, whatever their case and
    blanks; a number up to ten may be a word or a figure. A sample of which an answer cannot be read has no score, and a
    judge of which none can is an error. Sampling is off: temperature 0, one answer, a fixed seed;
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
        # Of a reward process, 500 is an error of the reward, which comes again; of such a service it passes.
        self._endpoint = Endpoint(options.url, options, f"judge {options.model!r}", again=AGAIN | {500})
        self.identity = self._served()
        self._ahead: Ahead[Read] = Ahead(options.concurrency)
        self._heard: set[str] = set()
        self._unread: Counter[str] = Counter()

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Ask about what will be scored, and return at once."""
        for calls in self._calls(images, prompts, metadata):
            for key, call in calls:
                self._ahead.begin(key, call)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores ``(B,)`` of pictures ``(B, 3, H, W)`` or clips ``(B, T, 3, H, W)`` in [0, 1]; NaN where it has
        none.

        Raises:
            RewardError: no answer, none that can be read, or a prompt has no questions.
        """
        calls = list(self._calls(images, prompts, metadata))
        values = iter(self._ahead.answers(call for sample in calls for call in sample))
        scores = [self._combined([self._value(next(values)) for _ in sample]) for sample in calls]
        return torch.tensor(scores, dtype=torch.float64)

    def _value(self, read: Read) -> float:
        if read.heard:
            self._heard.add(read.wanted)
        elif math.isnan(read.value) and read.wanted not in self._heard:
            self._unread[read.wanted] += 1
            if self._unread[read.wanted] == _PATIENCE:
                self._refuse(
                    f"none of {_PATIENCE} answers could be read as {read.wanted[:80]!r}, of the last one: {read.why}"
                )
            # That it says yes and no tells nothing of other words.
            if self._unread.total() == _PATIENCE_OF_ALL and all(map(is_either, self._heard)):
                self._refuse(
                    f"none of {_PATIENCE_OF_ALL} answers could be read as any of {len(self._unread)} words, of the "
                    f"last one, {read.wanted[:80]!r}: {read.why}"
                )
            if self._unread[read.wanted] == 1:
                log.warning("%s: a sample has no score: %s", self._endpoint.called, read.why)
        return read.value

    def _combined(self, values: list[float]) -> float:
        if any(map(math.isnan, values)):
            return math.nan
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

    def _ask(self, frames: Any, question: str, answer: str) -> Read:
        options = self._options
        urls = [f"data:image/png;base64,{encoded(frame)}" for frame in frames]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        request: dict[str, Any] = {
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
        request = {name: value for name, value in (request | options.request).items() if value is not None}
        most = 2**16 + _MOST_OF_TOKEN * options.tokens * (options.alternatives if options.reads == "answer" else 1)
        found = self._endpoint.ask("/chat/completions", request, most)
        try:
            choice = found["choices"][0]
            return written(choice) if options.reads == "number" else likelihood(choice, answer)
        except RewardError as error:
            self._refuse(str(error))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            self._refuse(
                f"the answer is no chat completion{' with logprobs' * (options.reads == 'answer')} ({error!r})"
            )

    def _served(self) -> dict[str, Any]:
        # Some services tell the list alone.
        listed = self._endpoint.ask("/models", None, 2**22, bare="data").get("data")
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
