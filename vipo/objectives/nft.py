"""DiffusionNFT: the forward process, an old policy that is pulled along, and a probability of being good per position.

A clean sample ``x0`` of the old policy is noised to ``x_t = (1 - t) x0 + t eps``; the velocity that leads back is
``v = eps - x0``. From the policy's and the old policy's prediction, two implicit policies: ``v+ = (1 - b) v_old + b
v_theta`` and ``v- = (1 + b) v_old - b v_theta``. A good sample is one that ``v+`` should predict, a bad one ``v-``. No
density, no classifier-free guidance, any solver.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from vipo.config.forward import DecayConfig, NftConfig
from vipo.objectives.advantages import Advantages
from vipo.objectives.forward import ForwardObjective, velocity_kl
from vipo.objectives.objective import Kept, Outcome, Points, Predictions, Share

# Of the published code's normaliser.
_SMALLEST_ERROR = 1e-5


class Nft(ForwardObjective):
    """DiffusionNFT on the levels of the chain, from the clean samples alone.

    Source: DiffusionNFT (arXiv 2509.16117) and its public code; credit is ours.
    """

    options: NftConfig

    @property
    def keeps(self) -> Mapping[Kept, DecayConfig]:
        """The old policy, which samples."""
        return {"sampler": self.options.old}

    def __call__(self, share: Share, points: Points, predictions: Predictions, advantages: Advantages) -> Outcome:
        """The loss, and the divergence to the generator as it was."""
        options, new, old = self.options, predictions.new, predictions.old
        assert old is not None
        assert points.noise is not None
        loss = nft_loss(
            new,
            old,
            points.noise - share.trajectory.clean,
            points.times,
            optimality(advantages.values, options.z),
            beta=options.beta,
            form=options.form,
            z=options.z,
        ).mean()
        metrics = {"distance/old": velocity_kl(new.detach(), old).mean()}
        if predictions.reference is not None:
            divergence = velocity_kl(new, predictions.reference).mean()
            loss, metrics["distance/reference"] = loss + options.kl_weight * divergence, divergence.detach()
        return Outcome(loss, metrics=metrics)


def optimality(advantages: Tensor, z: float) -> Tensor:
    """The probability of being good, ``q = .5 + .5 clip(A / Z, -1, 1)``.

    Args:
        advantages: ``(B,)``, or ``W(p) A`` per position ``(B, [T,] H, W)`` with non-negative credit W: where W is 0 a
            position is neither good nor bad, q = .5.
        z: Z. The paper divides by the group's or the batch's standard deviation, which advantages are already divided
            by (Z = 1); the public code clips advantages to [-5, 5] and divides by that (Z = 5).

    Returns:
        Like `advantages`, in [0, 1].

    Raises:
        ValueError: `z` is not above 0.

    Source: DiffusionNFT (arXiv 2509.16117) and its public code; per position it is ours.
    """
    if not z > 0:
        raise ValueError(f"z: {z} must be above 0")
    return 0.5 + 0.5 * (advantages / z).clamp(-1, 1)


def nft_loss(
    prediction: Tensor,
    old_prediction: Tensor,
    velocity: Tensor,
    times: Tensor,
    good: Tensor,
    *,
    beta: float,
    form: Literal["paper", "code"],
    z: float,
) -> Tensor:
    """The loss of each sample, ``mean over positions of q(p) |v+ - v|^2 + (1 - q(p)) |v- - v|^2``.

    The gradient in ``v_theta(p)`` is ``2 b [(2 q - 1)(v_old - v) + b (v_theta - v_old)]``, over the number of elements:
    where q is .5 the reward says nothing, and what is left, ``2 b^2 (v_theta - v_old)``, pulls to the old policy.

    Args:
        prediction: ``(B, C, [T,] H, W)``, ``v_theta(x_t)`` with its gradient.
        old_prediction: like `prediction`, without.
        velocity: like `prediction`, ``eps - x0``.
        times: ``(B,)`` t in [0, 1].
        good: `optimality`, ``(B,)`` or ``(B, [T,] H, W)``.
        beta: b, how far the implicit policies are from the old one; 1 or .1 as published.
        form: 'paper': the squared error of the velocity, as above. 'code': that of ``x0_hat = x_t - t v``, of which
            each half is divided by the sample's mean absolute error (at least 1e-5, without gradient), so that all
            times count alike; the whole is divided by b and multiplied by Z.
        z: Z of `good`, read by form 'code'.

    Returns:
        ``(B,)`` float32.

    Raises:
        ValueError: shapes disagree.

    Source: DiffusionNFT (arXiv 2509.16117), its loss and its public code; per position it is ours.
    """
    for name, other in (("old_prediction", old_prediction), ("velocity", velocity)):
        if other.shape != prediction.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(prediction.shape)} of prediction, got {tuple(other.shape)}"
            )
    batch, places = prediction.shape[:1], prediction.shape[:1] + prediction.shape[2:]
    if times.shape != batch or good.shape not in (batch, places):
        raise ValueError(
            f"times, good: expected shapes {tuple(batch)}, and {tuple(batch)} or {tuple(places)}, got "
            f"{tuple(times.shape)} and {tuple(good.shape)}"
        )
    new, old, target = prediction.float(), old_prediction.detach().float(), velocity.float()
    share = good.float().reshape(*good.shape, *([1] * (len(places) - good.ndim)))
    # x0_hat - x0 = -t (v_hat - v), whatever x_t is.
    scale = times.float().reshape(-1, *([1] * (new.ndim - 1))) if form == "code" else 1.0
    halves = []
    for policy in ((1 - beta) * old + beta * new, (1 + beta) * old - beta * new):
        error = scale * (policy - target)
        squares = error.square()
        if form == "code":
            size = error.detach().abs().flatten(1).mean(dim=1).clamp_min(_SMALLEST_ERROR)
            squares = squares / size.reshape(-1, *([1] * (error.ndim - 1))) * (z / beta)
        halves.append(squares.mean(dim=1))
    positive, negative = halves
    return (share * positive + (1 - share) * negative).flatten(1).mean(dim=1)
