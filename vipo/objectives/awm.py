"""Advantage Weighted Matching: a sample's flow-matching loss stands for its negative log-likelihood.

The policy gradient of that log-likelihood is pretraining's own loss, weighted by the advantage. One ratio a sample and
time, to the loss of the weights that sampled, keeps it close to them.
"""

from typing import Literal

import torch
from torch import Tensor

# Under the root of the published code.
_SMALLEST_ERROR = 1e-10

TimeWeight = Literal["uniform", "t", "t2"]


def matching_log_prob(
    prediction: Tensor,
    velocity: Tensor,
    times: Tensor,
    credit: Tensor | None = None,
    *,
    form: Literal["paper", "code"],
    time_weight: TimeWeight = "uniform",
    power: float = 0.25,
) -> Tensor:
    """The surrogate of a sample's log-likelihood at one time: ``-w(t) l`` with ``l = mean_p W(p) |v_theta - v|^2``.

    Credit enters here, inside the exponential of the ratio: positions of weight 0 do not move a sample's likelihood.
    A ratio per position is no ratio of densities, and the clip would decide by it.

    Args:
        prediction: ``(B, C, [T,] H, W)``, ``v_theta(x_t)`` with its gradient.
        velocity: like `prediction`, ``eps - x0``.
        times: ``(B,)`` t in [0, 1].
        credit: W, ``(B, [T,] H, W)``, non-negative (a negative weight would reward a worse match); None: 1 everywhere,
            the published scalar form.
        form: 'paper': as above. 'code': its default, `ghuber`: ``-(t / p) ((l + c)^p - c^p)`` with c = 1e-10, which
            takes its own weight t.
        time_weight: w(t) of form 'paper': 1, t or t^2.
        power: p of form 'code', in (0, 1].

    Returns:
        ``(B,)`` float32, at most 0.

    Raises:
        ValueError: shapes disagree.

    Source: AWM (arXiv 2509.25050) and its public code; credit is ours.
    """
    if velocity.shape != prediction.shape or times.shape != prediction.shape[:1]:
        raise ValueError(
            f"velocity, times: expected shapes {tuple(prediction.shape)} and ({len(prediction)},) of prediction, got "
            f"{tuple(velocity.shape)} and {tuple(times.shape)}"
        )
    error = (prediction.float() - velocity.float()).square().mean(dim=1)
    if credit is not None:
        if credit.shape != error.shape:
            raise ValueError(f"credit: expected shape {tuple(error.shape)} of positions, got {tuple(credit.shape)}")
        error = credit.float() * error
    loss, t = error.flatten(1).mean(dim=1), times.float()
    if form == "code":
        return -t / power * ((loss + _SMALLEST_ERROR) ** power - _SMALLEST_ERROR**power)
    return -loss * {"uniform": torch.ones_like(t), "t": t, "t2": t.square()}[time_weight]
