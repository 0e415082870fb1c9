"""What an objective is: where policies are compared, and the loss of what they predict there.

The trainer calls networks, objectives do not: an objective names the points at which the network is called, and is then
a pure function of the predictions. So it knows nothing of processes, adapters, precision or checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vipo.config.forward import DecayConfig
from vipo.config.objective import ObjectiveConfig
from vipo.config.registries import OBJECTIVES
from vipo.errors import VipoError
from vipo.objectives.advantages import Advantages
from vipo.parts import Part, load_part, told
from vipo.sampling.chain import Chain
from vipo.sampling.rollout import Trajectory

Needs = Literal["log_probabilities", "stochastic", "none"]
Kept = Literal["sampler", "anchor"]

# What the records of every update are called, or begin with.
_TAKEN = frozenset(
    {
        *("update", "loss", "grad", "log_ratio", "clip", "reward", "samples"),
        *("group", "map", "credit", "alarm", "time", "memory", "optimizer"),
    }
)


class ObjectiveError(VipoError):
    """An objective or a gate that cannot be loaded, used or trusted; the message names it."""


@dataclass(frozen=True)
class Share:
    """What was rolled out of one micro-batch of B samples, and which of its trained transitions a loss is of.

    Attributes:
        trajectory: the chains; `trajectory.clean` is what was decoded and rewarded.
        steps: ``(B,)`` int64, the transition of each sample.
        chain: noise levels and transition.
        draws: from a purpose to B generators on the CPU, keyed by it, the update, the sample and the place of this
            share among those of the sample: where an objective draws its noise and times.
    """

    trajectory: Trajectory
    steps: Tensor
    chain: Chain
    draws: Callable[[str], list[torch.Generator]]


@dataclass(frozen=True)
class Points:
    """Where the network is called.

    Attributes:
        latents: ``(B, C, [T,] H, W)`` float32.
        times: ``(B,)``, as in `Chain.times`; of flow matching the noise level sigma in (0, 1].
        noise: like `latents`, what they were noised with, for an objective that drew it.
    """

    latents: Tensor
    times: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True)
class Predictions:
    """What policies predict at the points of a share, like their latents: velocities, or noise (`Chain.prediction`).

    Attributes:
        new: by the policy that is trained, with its gradient.
        old: by the policy that sampled; None unless `Objective.needs_old`.
        reference: by the generator as it was; None unless `Objective.needs_reference`.
        anchor: by the kept policy of that name; None unless `Objective.keeps` it.
    """

    new: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    anchor: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """The loss of one share, and what it shows; all but the loss without gradient.

    Attributes:
        loss: scalar with its gradient.
        log_ratio: ``(B, ...)``, log of the ratio to the policy that sampled: 0 before an update's first optimizer step,
            which is checked. None of an objective without one.
        gated: ``(B, ...)``, the same as the gate saw it (a normalised one, say); None: `log_ratio`.
        dropped: ``(B,)``, the share of each sample that the gate dropped; None of an objective without a gate.
        metrics: scalars that are averaged over an update's shares and logged, by name.
    """

    loss: Tensor
    log_ratio: Tensor | None = None
    gated: Tensor | None = None
    dropped: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Part, ABC):
    """A loss of what was rolled out.

    Attributes:
        needs: what it asks of the chain: transitions with a density, noise in its steps, or nothing but its end. Of
            'none', all transitions may be drawn as `Share.steps`, of the others those that draw noise.
        needs_old: whether the policy that sampled is evaluated at the points (before the first optimizer step).
        needs_reference: whether the generator as it was is, beside every call of the trained policy.
        only_advantages: whether samples whose advantages are all 0 have no gradient, so that the network need not be
            called for a micro-batch of them.
        keeps: policies that follow the trained one slowly, and how: 'sampler' samples, and is `Predictions.old`, in the
            trained one's place; 'anchor' is `Predictions.anchor`, evaluated before the first optimizer step.
    """

    needs: ClassVar[Needs] = "none"

    @property
    def needs_old(self) -> bool:
        """See the class."""
        return False

    @property
    def needs_reference(self) -> bool:
        """See the class."""
        return False

    @property
    def only_advantages(self) -> bool:
        """See the class."""
        return False

    @property
    def keeps(self) -> Mapping[Kept, DecayConfig]:
        """See the class."""
        return {}

    @abstractmethod
    def points(self, share: Share) -> Points:
        """Where the policies are compared, of all B samples."""

    @abstractmethod
    def __call__(self, share: Share, points: Points, predictions: Predictions, advantages: Advantages) -> Outcome:
        """The loss.

        Args:
            share: what was rolled out.
            points: of it.
            predictions: at them.
            advantages: of the B samples; with credit, at this transition.
        """


def load_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration, with its gate.

    Raises:
        ObjectiveError: an import path is none, or names no `Objective`.
        ConfigError: an option of an import path's objective is wrong.
    """
    methods = ("needs_old", "needs_reference", "only_advantages", "points", "__call__")
    base: type[Objective] = Objective  # type: ignore[type-abstract]
    found = load_part(config, OBJECTIVES, base, methods, ObjectiveError, "objective", "objective")
    if found.needs not in (known := get_args(Needs)):
        raise ObjectiveError(f"objective {config.name!r}: needs {found.needs!r}, not one of {', '.join(known)}")
    return found


def checked_keeps(name: str, keeps: object) -> Mapping[Kept, DecayConfig]:
    """What an objective's `keeps` says.

    Raises:
        ObjectiveError: it is something else.
    """
    known = get_args(Kept)
    if not isinstance(keeps, Mapping) or not all(
        part in known and isinstance(decay, DecayConfig) for part, decay in keeps.items()
    ):
        raise ObjectiveError(
            f"objective {name!r}: keeps: expected a DecayConfig by {' and '.join(map(repr, known))}, got {keeps!r}"
        )
    return keeps


def checked_points(name: str, points: object, share: Share) -> Points:
    """What an objective's `points` gave.

    Raises:
        ObjectiveError: it is something else, or has another shape than the share's latents.
    """
    like = share.trajectory.clean
    if not isinstance(points, Points):
        raise ObjectiveError(f"objective {name!r}: expected Points, got a {type(points).__name__}")
    for part, value, shape in (("latents", points.latents, like.shape), ("times", points.times, like.shape[:1])):
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.device == like.device
        if not fits or value.shape != shape:
            like_it = told(like.new_empty(shape))
            raise ObjectiveError(f"objective {name!r}: points: {part}: expected {like_it}, got {told(value)}")
    return points


def checked_outcome(name: str, needs: Needs, outcome: object, share: Share) -> Outcome:
    """What an objective gave.

    Raises:
        ObjectiveError: it is something else, its loss is no scalar with a gradient, another part has a wrong shape, or
            one that needs log-probabilities gives no log-ratio to check.
    """
    called, batch = f"objective {name!r}", len(share.steps)
    if not isinstance(outcome, Outcome):
        raise ObjectiveError(f"{called}: expected an Outcome, got a {type(outcome).__name__}")
    loss = outcome.loss
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        gradient = "" if not isinstance(loss, Tensor) or loss.requires_grad else " without gradient"
        raise ObjectiveError(f"{called}: expected a scalar loss with its gradient, got {told(loss)}{gradient}")
    for part in ("log_ratio", "gated", "dropped"):
        value = getattr(outcome, part)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape[: None if part == "dropped" else 1] != (batch,):
            raise ObjectiveError(f"{called}: {part}: expected {batch} samples, got {told(value)}")
    if needs == "log_probabilities" and outcome.log_ratio is None:
        raise ObjectiveError(f"{called}: needs log-probabilities and gives no log_ratio, by which they are checked")
    for key, value in outcome.metrics.items():
        if not isinstance(value, Tensor) or value.ndim:
            raise ObjectiveError(f"{called}: metrics: {key!r}: expected a scalar tensor, got {told(value)}")
        if key in _TAKEN or key.partition("/")[0] in _TAKEN:
            raise ObjectiveError(f"{called}: metrics: {key!r} is one of every run's; give it another name")
    return outcome
