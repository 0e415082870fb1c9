"""What a reward is, how it is found by name, and how it is called."""

import copy
import difflib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.config.registries import REWARDS
from vipo.errors import VipoError
from vipo.foreign import foreign, resolve

Reward = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Tensor]
"""``(images (B, 3, H, W) or videos (B, T, 3, H, W) float32 in [0, 1], prompts, metadata) -> (B,)``; larger is better.

A reward takes pictures, videos or both, and raises `RewardError` for what it does not take.
"""


class RewardError(VipoError):
    """A reward that cannot be found, loaded or trusted; the message names the reward."""


def find_reward(name: str) -> Any:
    """The object that `name` names, imported but not called yet: a callable, or a class of callables.

    A registered name stands for an import path, and an import path ``package.module:object`` names the object itself.

    Raises:
        RewardError: no such reward, its module cannot be imported, or the object is not callable.
    """
    if name not in REWARDS and ":" not in name:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RewardError(
            f"unknown reward {name!r}; {hint}known: {', '.join(REWARDS)}, or an import path 'package.module:object'"
        )
    path = REWARDS.get(name, name)
    # What ships is not others' code.
    found = pkgutil.resolve_name(path) if name in REWARDS else resolve(path, RewardError, _called(name))
    if not callable(found):
        raise RewardError(f"{_called(name)}: {path} is a {type(found).__name__}, not a callable")
    return found


def load_reward(name: str, device: str = "cpu") -> Reward:
    """The reward that `name` names (see `find_reward`).

    An object that is a class is instantiated with ``device=device``: that is where a reward with a model loads its
    weights.

    Raises:
        RewardError: it cannot be found, its class cannot be instantiated, or the instance is not callable.
    """
    found = find_reward(name)
    if isinstance(found, type):
        with foreign(RewardError, _called(name), name):
            found = found(device=device)
        if not callable(found):
            raise RewardError(f"{_called(name)}: its instance is a {type(found).__name__}, not a callable")
    reward: Reward = found
    return reward


def _called(name: str) -> str:
    return f"reward {name!r}"


def score(
    name: str, reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Tensor:
    """Score a batch and check what came back.

    The reward gets copies and runs as others' code does (`vipo.foreign.foreign`): whatever it does to them or to the
    process, nothing else sees it.

    Args:
        name: the reward's name, for messages.
        reward: as `load_reward` gives it.
        images: ``(B, 3, H, W)``, or videos ``(B, T, 3, H, W)``, float32 in [0, 1].
        prompts: B texts.
        metadata: B mappings, empty where a prompt has none.

    Returns:
        ``(B,)`` float32 on the CPU, without gradient. NaN and infinities are left in place; a picture that is
        itself not finite has no score and gets NaN.

    Raises:
        ValueError: the arguments do not fit each other.
        RewardError: the reward raised, or returned something other than a dense tensor of shape ``(B,)`` of real
            numbers.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or images.dtype != torch.float32:
        raise ValueError(
            "images: expected float32 of shape (B, 3, H, W) or (B, T, 3, H, W), "
            f"got {images.dtype} of {tuple(images.shape)}"
        )
    batch = images.shape[0]
    for argument, values in (("prompts", prompts), ("metadata", metadata)):
        if len(values) != batch:
            raise ValueError(f"{argument}: expected {batch} as in images {tuple(images.shape)}, got {len(values)}")
    finite = images.isfinite().flatten(1).all(dim=1).cpu()
    with foreign(RewardError, _called(name), name), torch.no_grad():
        # Copies, for a reward may write into them through a view that nothing here can notice.
        scores = reward(images.clone(), list(prompts), copy.deepcopy(list(metadata)))
        return _checked(name, scores, batch).masked_fill(~finite, float("nan"))


def _checked(name: str, scores: Any, batch: int) -> Tensor:
    if not isinstance(scores, Tensor):
        raise RewardError(f"{_called(name)}: expected a tensor of shape ({batch},), got a {type(scores).__name__}")
    if scores.shape != (batch,):
        raise RewardError(f"{_called(name)}: expected shape ({batch},), got {tuple(scores.shape)}")
    if scores.is_complex() or scores.is_quantized or scores.layout != torch.strided or scores.is_meta:
        raise RewardError(
            f"{_called(name)}: expected a dense tensor of real numbers, got {scores.dtype}, {scores.layout}, on "
            f"{scores.device}"
        )
    # Without what a subclass does in its own operations.
    return scores.detach().as_subclass(Tensor).to("cpu", torch.float32)
