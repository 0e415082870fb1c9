"""Controls: what is left of a source's weights without their layout. They wrap any source."""

import torch
from torch import Tensor

from vipo.config.credit import Control


def controlled(
    control: Control,
    values: Tensor,
    constant: Tensor,
    groups: Tensor,
    *,
    mean_one: bool = False,
    permutations: Tensor | None = None,
) -> Tensor:
    """The weights under a control.

    Args:
        control: 'none': as they are; 'inverted': each sample's turned upside down between its own extremes; 'mean':
            each sample's own mean everywhere; 'group': the mean over the sample's group, a layout of no sample's own;
            'shuffled': each sample's weights at other positions.
        values: ``(N, [S,] [T,] H, W)``, not negative.
        constant: ``(N,)`` bool, ones of which nothing is said: they stay, and are no part of their group's mean.
        groups: ``(N,)`` int64 group index of each sample, from 0.
        mean_one: whether `values` were divided by their mean, so that inverted ones are as well.
        permutations: ``(N, positions)`` int64, read by 'shuffled'; where each transition has weights of its own, the
            same positions are exchanged in all of them.

    Raises:
        ValueError: 'shuffled' without permutations of the positions.
    """
    column = (-1, *([1] * (values.ndim - 1)))
    if control == "inverted":
        within = tuple(range(1, values.ndim))
        inverted = values.amax(dim=within, keepdim=True) + values.amin(dim=within, keepdim=True) - values
        if mean_one:
            inverted = divided_by_mean(inverted)
        return torch.where(constant.reshape(column), torch.ones_like(values), inverted)
    if control == "mean":
        return values.flatten(1).mean(dim=1).reshape(column).expand_as(values)
    if control == "group":
        averaged = torch.ones_like(values)
        for group in range(int(groups.max()) + 1):
            members = (groups == group) & ~constant
            if bool(members.any()):
                averaged[members] = values[members].mean(dim=0)
        return averaged
    if control == "shuffled":
        return _shuffled(values, permutations)
    return values


def divided_by_mean(values: Tensor) -> Tensor:
    """Each sample's weights over their mean; zeros stay."""
    within = tuple(range(1, values.ndim))
    return values / values.mean(dim=within, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def _shuffled(values: Tensor, permutations: Tensor | None) -> Tensor:
    count = 0 if permutations is None else permutations.shape[-1]
    if permutations is None or len(permutations) != len(values) or not count or values[0].numel() % count:
        found = None if permutations is None else tuple(permutations.shape)
        raise ValueError(f"permutations: expected one of the positions of each of {tuple(values.shape)}, got {found}")
    flat = values.reshape(len(values), -1, count)
    return flat.gather(2, permutations[:, None].expand_as(flat)).reshape(values.shape)
