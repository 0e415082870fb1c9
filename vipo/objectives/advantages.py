"""From rewards to advantages per sample and per position (docs/method.md, Advantages)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Std = Literal["group", "batch", "none"]
Combine = Literal["advantages", "rewards"]


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of one update.

    Attributes:
        values: ``(N,)``, ``(N, S)`` where each transition has its own, or ``(N, [S,] [T,] H, W)``; float32, clipped; 0
            for samples that are left out.
        valid: ``(N,)`` bool, False where a reward was not finite.
        group_std: ``(groups,)`` standard deviation of the weighted reward within each group, its mean over positions;
            0 where all rewards are equal.
        zero_std: ``(groups,)`` bool, groups whose rewards are all equal (no gradient).
    """

    values: Tensor
    valid: Tensor
    group_std: Tensor
    zero_std: Tensor


@dataclass(frozen=True)
class Advantages:
    """What samples are worth, and where.

    Attributes:
        values: ``(B,)``, with credit ``(B, [T,] H, W)``: A, or W(p) A. Of an update, ``(N, S, [T,] H, W)``, or without
            credit ``(N, S)``, where each of the S transitions has credit or an advantage of its own.
        scalar: ``(B,)``, A; where credit is multiplied into the reward, or each transition has its own advantage, the
            mean of them.
        weights: like `values`, W(p); None without credit, or where it is multiplied into the reward.
    """

    values: Tensor
    scalar: Tensor
    weights: Tensor | None = None


def group_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    std_floor: float,
    clip: float,
    std: Std = "group",
    credit: Tensor | None = None,
    combine: Combine = "advantages",
) -> GroupAdvantages:
    """Normalise each reward within its group, weight, add and clip.

    ``A_i = sum_k w_k (r_ik - mean_k) / (std_k + floor)``. With `credit` (the ablation that multiplies it into the
    reward) the same of ``W_i(p) r_ik``, position by position. A reward that is equal within a group says nothing of
    its samples and adds 0 to their advantages, whatever their credit.

    Args:
        rewards: ``(N,)`` per reward name; a sample with a non-finite value is left out.
        weights: weight per reward name.
        groups: ``(N,)`` int64 group index of each sample, from 0.
        std_floor: added to each standard deviation.
        clip: the advantages are clipped to [-clip, clip].
        std: 'group': the sample standard deviation within the group (ddof 1; DanceGRPO, ViPO); 'batch': the
            population's over all samples of the update (ddof 0; Flow-GRPO); 'none': 1, without floor (Dr. GRPO). The
            mean is the group's in all.
        credit: ``(N, [S,] [T,] H, W)``, non-negative; multiplied into the rewards.
        combine: 'rewards': they are weighted and added first, and normalised as one (Flow-GRPO).

    Raises:
        ValueError: names or shapes disagree, or credit is negative.

    Source: DanceGRPO (arXiv 2505.07818), equation of the group advantage; ViPO keeps it. Dr. GRPO (arXiv 2503.20783).
    """
    rewards, weights = _combined(rewards, weights, combine)
    for name, reward in rewards.items():
        if reward.shape != groups.shape:
            raise ValueError(
                f"rewards[{name!r}]: expected shape {tuple(groups.shape)} of groups, got {tuple(reward.shape)}"
            )
    valid = torch.stack([reward.isfinite() for reward in rewards.values()]).all(dim=0)
    placed = {
        name: (reward if credit is None else allocate_advantages(reward, credit)).double()
        for name, reward in rewards.items()
    }
    count = int(groups.max()) + 1
    total = torch.stack([weights[name] * values for name, values in placed.items()]).sum(dim=0)
    values = torch.zeros_like(total)
    group_std = torch.zeros(count, dtype=torch.float64)
    zero_std = torch.ones(count, dtype=torch.bool)
    for group in range(count):
        members = (groups == group) & valid
        # Of the rewards themselves: credit differs where rewards do not.
        told = [name for name, reward in rewards.items() if bool((reward[members] != reward[members][:1]).any())]
        if not told:
            continue
        zero_std[group] = False
        group_std[group] = total[members].std(dim=0).mean()
        for name in told:
            own = placed[name][members]
            values[members] += (
                weights[name] * (own - own.mean(dim=0)) / _divisor(own, placed[name][valid], std, std_floor)
            )
    return GroupAdvantages(values.clamp(-clip, clip).float(), valid, group_std.float(), zero_std)


def _combined(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], combine: Combine
) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    if rewards.keys() != weights.keys():
        raise ValueError(f"weights: expected the rewards {sorted(rewards)}, got {sorted(weights)}")
    if combine == "advantages":
        return rewards, weights
    total = torch.stack([weights[name] * values.double() for name, values in rewards.items()]).sum(dim=0)
    return {"all rewards": total}, {"all rewards": 1.0}


def _divisor(own: Tensor, everyones: Tensor, std: Std, floor: float) -> Tensor:
    if std == "none":
        return torch.ones((), dtype=own.dtype)
    return (own.std(dim=0) if std == "group" else everyones.std(dim=0, correction=0)) + floor


def step_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    std_floor: float,
    clip: float,
    std: Std = "group",
    combine: Combine = "advantages",
) -> GroupAdvantages:
    """Signed advantages of transitions: what each gained of every reward, as `group_advantages` has it of samples.

    ``A_i,t = sum_k w_k (d_ik,t - mean_k,t) / (std_k,t + floor)`` with ``d_ik,t = r_ik,t+1 - r_ik,t``, the statistics of
    the group at that step. A reward whose samples end alike adds 0 at every step: what none of them won, no transition
    made.

    Args:
        rewards: ``(N, S + 1)`` per reward name, of the estimates of x0 before each transition and of the sample; a
            sample with a value that is not finite is left out.
        weights, groups, std_floor, clip, std, combine: as of `group_advantages`.

    Returns:
        ``(N, S)``; all else as of the samples' own rewards.

    Raises:
        ValueError: names or shapes disagree.

    Source: Stepwise-Flow-GRPO (arXiv 2603.28718) and DenseGRPO (arXiv 2601.20218): a transition's own gain, normalised
    within the group and the step.
    """
    for name, reward in rewards.items():
        if reward.ndim != 2 or reward.shape[1] < 2:
            raise ValueError(f"rewards[{name!r}]: expected (N, S + 1), got {tuple(reward.shape)}")
    rewards, weights = _combined(rewards, weights, combine)
    sound = torch.stack([reward.isfinite().all(dim=1) for reward in rewards.values()]).all(dim=0)
    final = {name: torch.where(sound, reward[:, -1], torch.nan) for name, reward in rewards.items()}
    whole = group_advantages(final, weights, groups, std_floor, clip, std)
    gains = {}
    for name, reward in rewards.items():
        own = torch.where(sound[:, None], reward.double().diff(dim=1), torch.nan)
        for group in groups.unique():
            members = (groups == group) & sound
            if bool((final[name][members] == final[name][members][:1]).all()):
                own[members] = 0
        gains[name] = own
    steps = next(iter(gains.values())).shape[1]
    found = [
        group_advantages({name: own[:, step] for name, own in gains.items()}, weights, groups, std_floor, clip, std)
        for step in range(steps)
    ]
    return replace(whole, values=torch.stack([step.values for step in found], dim=1))


def best_and_worst(advantages: Tensor, groups: Tensor, count: int) -> Tensor:
    """Rows of the `count` / 2 highest and `count` / 2 lowest advantages of each group.

    Args:
        advantages: ``(N,)``; a sample that was left out of its group has 0 and teaches nothing where it is chosen.
        groups: ``(N,)`` int64 group index of each sample, from 0; every group has the same size.
        count: even, at most the group's size.

    Returns:
        ``(groups, count)`` int64 rows; each group's best, worst, second best, second worst, and so on. Equal
        advantages are ordered by row.

    Raises:
        ValueError: `count` is odd or exceeds a group.

    Source: best-of-N selection of DanceGRPO (arXiv 2505.07818).
    """
    chosen = []
    for group in range(int(groups.max()) + 1):
        rows = torch.nonzero(groups == group).flatten()
        if count % 2 or count > len(rows):
            raise ValueError(f"count: {count} must be even and at most the group size {len(rows)}")
        ordered = rows[advantages[rows].argsort(descending=True, stable=True)]
        chosen.append(torch.stack([ordered[: count // 2], ordered.flip(0)[: count // 2]], dim=1).flatten())
    return torch.stack(chosen)


def allocate_advantages(advantages: Tensor, credit: Tensor) -> Tensor:
    """``A_i^p = W_i(p) A_i``: ``(N,)`` and ``(N, [S,] [T,] H, W)`` to the latter; ``(N, S)`` with ``(N, S or 1, ...)``.

    Raises:
        ValueError: a weight is negative (it would flip an advantage's sign), or shapes disagree.
    """
    if len(credit) != len(advantages):
        raise ValueError(
            f"credit: expected that of {len(advantages)} samples, one per advantage, got shape {tuple(credit.shape)}"
        )
    if bool((credit < 0).any()):
        raise ValueError(f"credit: a value is negative ({float(credit.min())}); it would flip the sign of an advantage")
    return credit * advantages.reshape(*advantages.shape, *([1] * (credit.ndim - advantages.ndim)))
