"""From rewards to advantages per sample and per position (METHOD section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of one update.

    Attributes:
        values: ``(N,)`` float32, clipped; 0 for samples that are left out.
        valid: ``(N,)`` bool, False where a reward was not finite.
        group_std: ``(groups,)`` standard deviation of the weighted reward within each group.
        zero_std: ``(groups,)`` bool, groups whose rewards are all equal (no gradient).
    """

    values: Tensor
    valid: Tensor
    group_std: Tensor
    zero_std: Tensor


def group_advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, std_floor: float, clip: float
) -> GroupAdvantages:
    """Normalise each reward within its group, weight, add and clip.

    ``A_i = sum_k w_k (r_ik - mean_k) / (std_k + floor)`` with the sample standard deviation (ddof 1).

    Args:
        rewards: ``(N,)`` per reward name; a sample with a non-finite value is left out of its group.
        weights: weight per reward name.
        groups: ``(N,)`` int64 group index of each sample, from 0.
        std_floor: added to each standard deviation.
        clip: the advantages are clipped to [-clip, clip].

    Raises:
        ValueError: names or shapes disagree.

    Source: DanceGRPO (arXiv 2505.07818), equation of the group advantage; ViPO keeps it.
    """
    if rewards.keys() != weights.keys():
        raise ValueError(f"weights: expected the rewards {sorted(rewards)}, got {sorted(weights)}")
    for name, reward in rewards.items():
        if reward.shape != groups.shape:
            raise ValueError(
                f"rewards[{name!r}]: expected shape {tuple(groups.shape)} of groups, got {tuple(reward.shape)}"
            )
    valid = torch.stack([reward.isfinite() for reward in rewards.values()]).all(dim=0)
    count = int(groups.max()) + 1
    values = torch.zeros(len(groups), dtype=torch.float64)
    total = torch.stack([weights[name] * reward.double() for name, reward in rewards.items()]).sum(dim=0)
    group_std = torch.zeros(count, dtype=torch.float64)
    zero_std = torch.ones(count, dtype=torch.bool)
    for group in range(count):
        members = (groups == group) & valid
        if int(members.sum()) < 2:
            continue
        group_std[group] = total[members].std()
        for name, reward in rewards.items():
            own = reward[members].double()
            if bool((own != own[0]).any()):
                zero_std[group] = False
                values[members] += weights[name] * (own - own.mean()) / (own.std() + std_floor)
    return GroupAdvantages(values.clamp(-clip, clip).float(), valid, group_std.float(), zero_std)


def weight_maps(
    kind: Literal["psm", "uniform", "inverted"], maps: Tensor, constant: Tensor, normalize: Literal["minmax", "mean"]
) -> Tensor:
    """The per-position weights of an arm.

    Args:
        kind: psm: the allocation maps as they are; uniform: ones; inverted: each map turned upside down.
        maps: ``(N, H, W)``, non-negative.
        constant: ``(N,)`` bool, maps without structure; they stay ones.
        normalize: what `maps` were normalised by, so that an inverted map is as well.
    """
    if kind == "uniform":
        return torch.ones_like(maps)
    if kind == "psm":
        return maps
    inverted = maps.amax(dim=(-2, -1), keepdim=True) - maps
    if normalize == "mean":
        inverted = inverted / inverted.mean(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    return torch.where(constant[:, None, None], torch.ones_like(maps), inverted)


def allocate_advantages(advantages: Tensor, maps: Tensor) -> Tensor:
    """``A_i^p = M_i(p) A_i``: ``(N,)`` and ``(N, [T,] H, W)`` to ``(N, [T,] H, W)``.

    Raises:
        ValueError: a map is negative (it would flip an advantage's sign), or shapes disagree.
    """
    if len(maps) != len(advantages):
        raise ValueError(f"maps: expected {len(advantages)} maps, one per advantage, got shape {tuple(maps.shape)}")
    if bool((maps < 0).any()):
        raise ValueError(f"maps: a value is negative ({float(maps.min())}); it would flip the sign of an advantage")
    return maps * advantages.reshape(-1, *([1] * (maps.ndim - 1)))
