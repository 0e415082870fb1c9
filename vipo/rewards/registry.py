"""What a reward is, how it is found by name, and how it is called."""

import difflib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.config.models import REWARDS
from vipo.errors import VipoError

Reward = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Tensor]
"""``(images (B, 3, H, W) or videos (B, T, 3, H, W) float32 in [0, 1], prompts, metadata) -> (B,)``; larger is better.

A reward takes pictures, videos or both, and raises `RewardError` for what it does not take.
"""


class RewardError(VipoError):
    """A reward that cannot be found, loaded or trusted; the message names the reward."""


def load_reward(name: str, device: str = "cpu") -> Reward:
    """The reward that `name` names.

    A registered name stands for an import path, and an import path ``package.module:object`` names the reward
    callable itself. An object that is a class is instantiated with ``device=device`` first: that is where a
    reward with a model loads its weights.

    Raises:
        RewardError: no such reward, its module cannot be imported, its class cannot be instantiated, or the
            object is not callable.
    """
    if name not in REWARDS and ":" not in name:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RewardError(
            f"unknown reward {name!r}; {hint}known: {', '.join(REWARDS)}, or an import path 'package.module:object'"
        )
    path = REWARDS.get(name, name)
    try:
        found = pkgutil.resolve_name(path)
        reward = found(device=device) if isinstance(found, type) else found
    except Exception as error:
        raise RewardError(f"reward {name!r}: {path} cannot be loaded ({type(error).__name__}: {error})") from error
    if not callable(reward):
        raise RewardError(f"reward {name!r}: {path} is a {type(reward).__name__}, not a callable")
    loaded: Reward = reward
    return loaded


def score(
    name: str, reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Tensor:
    """Score a batch and check what came back.

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
        RewardError: the reward raised, or returned something other than a tensor of shape ``(B,)``.
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
    try:
        with torch.no_grad():
            scores = reward(images, prompts, metadata)
    except Exception as error:
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(scores, Tensor):
        raise RewardError(f"reward {name!r}: expected a tensor of shape ({batch},), got a {type(scores).__name__}")
    if scores.shape != (batch,):
        raise RewardError(f"reward {name!r}: expected shape ({batch},), got {tuple(scores.shape)}")
    finite = images.isfinite().flatten(1).all(dim=1).cpu()
    return scores.detach().to("cpu", torch.float32).masked_fill(~finite, float("nan"))
