"""A reward of vipo's behind HTTP, for another vipo: the command `vipo serve-reward`."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vipo.provenance.environment import package_sha256
from vipo.rewards.errors import RewardError
from vipo.rewards.registry import find_reward, load_reward, score_where, weight_files
from vipo.rewards.served import serve


class OnPillow:
    """A reward of tensors as one of Pillow pictures, which is what `vipo.rewards.served.serve` calls.

    Args:
        name: a registered reward or an import path.
        arguments: its options.
        device: where it computes.

    Raises:
        RewardError: it cannot be loaded.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], device: str) -> None:
        self._name, self._device = name, device
        _, options = find_reward(name, arguments)
        self._reward = load_reward(name, device, arguments)
        self.identity = {
            "reward": name,
            "arguments": {} if options is None else options.model_dump(mode="json"),
            "packages": serve.installed(),
            "code": {"vipo": package_sha256()},
            "weights": serve.file_hashes(weight_files(self._reward)),
        }

    def __call__(self, pictures: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        """Scores, or scores and where."""
        try:
            levels = np.stack([_levels(picture) for picture in pictures])
        except ValueError as error:
            raise RewardError("the samples of a request are pictures of one size, or clips of one length") from error
        # Contiguous, as a generator's pictures are: sums over another layout are added in another order.
        images = torch.from_numpy(levels).movedim(-1, -3).contiguous().to(self._device, torch.float32) / 255
        found = score_where(self._name, self._reward, images, prompts, metadata)
        if found.where is None:
            return found.scores
        return found.scores, found.where


def _levels(picture: Any) -> np.ndarray[Any, Any]:
    if isinstance(picture, list):
        return np.stack([np.asarray(frame) for frame in picture])
    return np.asarray(picture)


def serve_reward(
    name: str, arguments: str, device: str, host: str, port: int, token_env: str | None, *, with_parent: bool
) -> None:
    """Load a reward, and answer until the process is ended; the port is told on standard output.

    Args:
        name: a registered reward or an import path.
        arguments: its options, as JSON.
        device: where it computes.
        host, port: where it listens; port 0 is a free one.
        token_env: environment variable of the token that each request must hold.
        with_parent: end when standard input does.

    Raises:
        RewardError: what cannot be served.
    """
    try:
        given = json.loads(arguments)
        token = serve.token_of(token_env, host)
        if not isinstance(given, dict):
            raise ValueError(f"--arguments {arguments!r}: expected an object such as {{}}")
    except ValueError as error:
        raise RewardError(str(error)) from error
    ready = serve.own_output()
    score = OnPillow(name, given, device)
    try:
        server = serve.Server((host, port), score, score.identity, token)
    except OSError as error:
        raise RewardError(f"{host}:{port}: cannot be listened at ({error.strerror}); choose another") from error
    serve.serve(server, ready, with_parent=with_parent)
