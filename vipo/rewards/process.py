"""The reward `process`: another reward, in an environment, on a GPU or on a host of its own, asked over HTTP."""

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vipo.config.compose import repository_root
from vipo.config.registries import REWARDS
from vipo.config.reward_options import REWARD_OPTIONS, places
from vipo.config.reward_process import ProcessOptions
from vipo.rewards.ahead import Ahead, key_of
from vipo.rewards.child import Child, python_of
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import eight_bit
from vipo.rewards.scored import Scored
from vipo.rewards.served import serve
from vipo.rewards.wire import Endpoint, encoded, finite_number

# Of an answer, beside its maps: a score of each sample.
_MOST_BESIDE, _MOST_OF_SCORE, _MOST_IDENTITY = 2**16, 64, 2**22
_LISTS, _MOST_TOLD = ("packages", "code", "weights"), 2**20
_TOLD = {"reward": str, "arguments": dict, "packages": dict, "code": dict, "weights": dict}

_Answer = tuple[list[float], Tensor | None]


@dataclass(frozen=True)
class _Request:
    """Samples that are asked for at once; equal ones have the same `key`."""

    levels: np.ndarray[Any, Any]
    prompts: list[str]
    metadata: list[Mapping[str, Any]]
    key: bytes


class Process:
    """What another process gives, with its map of where, if it tells one.

    Pictures travel as 8-bit files hold them. The samples of a call are asked for in requests of ``batch``, several at a
    time; a request's answer does not depend on the others.

    Args:
        device: where a process that is started here computes, unless the options say.
        options: section of the term.

    Raises:
        RewardError: it cannot be started or reached, or scores something else.
    """

    Options = ProcessOptions

    def __init__(self, device: str, options: ProcessOptions) -> None:
        self._options = options
        called = f"reward process {options.reward!r}"
        self._child = None
        if options.environment is not None:
            command = _command(options, options.device or _this(device))
            self._child = Child(command, options.start_timeout, called)
        url = options.url if self._child is None else self._child.url
        assert url is not None
        token = None if self._child is None else self._child.token
        gone = (lambda: None) if self._child is None else self._child.gone
        self._endpoint = Endpoint(url, options, called, token, gone)
        self.identity = self._checked_identity()
        self._ahead: Ahead[_Answer] = Ahead(options.concurrency)

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Ask for the scores of what will be scored, and return at once; a call with the same samples gives them."""
        for request in self._requests(images, prompts, metadata):
            self._ahead.begin(request.key, partial(self._ask, request))

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor | Scored:
        """Scores ``(B,)`` of pictures ``(B, 3, H, W)`` or videos ``(B, T, 3, H, W)`` in [0, 1]; NaN where it has none.

        Raises:
            RewardError: no answer, or one that cannot be used.
        """
        requests = self._requests(images, prompts, metadata)
        found = self._ahead.answers((request.key, partial(self._ask, request)) for request in requests)
        scores = torch.tensor([score for part, _ in found for score in part], dtype=torch.float64)
        maps = [where for _, where in found if where is not None]
        if not maps:
            return scores
        if len(maps) < len(found) or len({tuple(where.shape[1:]) for where in maps}) > 1:
            raise RewardError(f"{self._endpoint.called}: its maps of where are not of one size")
        return Scored(scores, torch.cat(maps))

    def _requests(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[_Request]:
        pixels = eight_bit(images)
        requests = []
        for start in range(0, len(pixels), self._options.batch):
            part = slice(start, start + self._options.batch)
            texts, rows = list(prompts[part]), list(metadata[part])
            requests.append(_Request(pixels[part], texts, rows, key_of(pixels[part], texts, rows)))
        return requests

    def _ask(self, request: _Request) -> _Answer:
        clip = request.levels.ndim == 5
        samples = [
            {
                "prompt": prompt,
                "metadata": dict(row),
                "clip": clip,
                "frames": [encoded(frame, self._options.format) for frame in (sample if clip else sample[None])],
            }
            for sample, prompt, row in zip(request.levels, request.prompts, request.metadata, strict=True)
        ]
        # A map of where is no finer than the pictures: four bytes a pixel, in base64.
        most = _MOST_BESIDE + len(samples) * _MOST_OF_SCORE + 8 * math.prod(request.levels.shape[:-1])
        return self._checked(self._endpoint.ask("/score", {"samples": samples}, most), request)

    def _checked(self, answer: Mapping[str, Any], request: _Request) -> _Answer:
        if answer.get("digest") != self._digest:
            raise RewardError(
                f"{self._endpoint.called}: another one answers than at the start of this run; start the same command "
                "again, which then looks at what it is"
            )
        scores, count = answer.get("scores"), len(request.prompts)
        if not isinstance(scores, list) or len(scores) != count:
            told = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
            raise RewardError(f"{self._endpoint.called}: expected {count} scores, got {told}")
        values = []
        for score in scores:
            value = math.nan if score is None else finite_number(score)
            if value is None:
                raise RewardError(f"{self._endpoint.called}: {str(score)[:80]!r} is no finite number; null is no score")
            values.append(value)
        where = answer.get("where")
        return values, None if where is None else self._map(where, request.levels.shape)

    def _map(self, where: Any, shape: tuple[int, ...]) -> Tensor:
        leading = shape[:-3]
        try:
            sides = tuple(where["shape"])
            raw = base64.b64decode(where["float32"], validate=True)
            whole = all(type(side) is int and side > 0 for side in sides)
            if not whole or sides[:-2] != leading or len(sides) != len(leading) + 2:
                raise ValueError(f"shape {sides!r:.100}")
            if len(raw) != 4 * math.prod(sides):
                raise ValueError(f"{len(raw)} bytes of shape {sides}")
        except (TypeError, KeyError, ValueError, binascii.Error) as error:
            wanted = f"({', '.join(map(str, leading))}, h, w)"
            raise RewardError(
                f"{self._endpoint.called}: where: expected float32 of shape {wanted} in base64 ({error})"
            ) from error
        return torch.from_numpy(np.frombuffer(raw, dtype="<f4").astype(np.float32).reshape(sides))

    def _checked_identity(self) -> dict[str, Any]:
        identity, called = self._endpoint.ask("/identity", None, _MOST_IDENTITY), self._endpoint.called
        if identity.get("protocol") != serve.PROTOCOL:
            raise RewardError(
                f"{called}: is no server of protocol {serve.PROTOCOL}; start one with 'vipo serve-reward'"
            )
        if wrong := [name for name, kind in _TOLD.items() if not isinstance(identity.get(name), kind)]:
            raise RewardError(f"{called}: does not say what it is ({', '.join(wrong)})")
        self._digest = identity.get("digest")
        told = {name: identity[name] for name in _TOLD}
        # It goes into records as it is.
        plain = all(isinstance(value, str) for name in _LISTS for value in told[name].values())
        if not plain or len(json.dumps(told)) > _MOST_TOLD:
            raise RewardError(f"{called}: says of {', '.join(_LISTS)} something else than texts, or too much")
        reward, arguments = self._options.reward, self._options.arguments
        if told["reward"] != reward:
            raise RewardError(f"{called}: scores reward {told['reward'][:200]}, not {reward}; start it with that")
        if differing := _differing(reward, arguments, told["arguments"]):
            here, there = ({key: pair[side] for key, pair in differing.items()} for side in (0, 1))
            raise RewardError(f"{called}: scores with arguments {str(there)[:200]}, not {here}; start it with those")
        return told


def _differing(reward: str, given: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Arguments that a reward is asked for with and those that its server tells, by name, where they differ.

    A registered one tells its defaults too, and is held to them but for where its weights are, whose hashes are
    recorded, and how they are computed with.
    """
    wanted, free = dict(given), set[str | None]()
    if (section := REWARD_OPTIONS.get(reward) if reward in REWARDS else None) is not None:
        wanted = section.model_validate(wanted).model_dump(mode="json")
        free = {name for place in places(reward).items() for name in place} | {"batch", "resident"}
    names = sorted(name for name in wanted.keys() | there.keys() if name in given or name not in free)
    pairs = {name: (wanted.get(name), there.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if (name in wanted) != (name in there) or pair[0] != pair[1]}


def _command(options: ProcessOptions, device: str) -> list[str]:
    python = str(python_of(str(options.environment), repository_root()))
    start = [python, "-P", "-m", "vipo.cli", "serve-reward"] if options.takes == "tensors" else [python, serve.__file__]
    return [*start, options.reward, "--arguments", json.dumps(options.arguments), "--device", device]


def _this(device: str) -> str:
    """The very device of this process, for another one."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
