"""From an update's samples to the weights of their advantages."""

import functools
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.config.credit import Control, CreditConfig
from vipo.config.registries import CREDIT_SOURCES
from vipo.credit.controls import controlled, divided_by_mean
from vipo.credit.costs import Costs
from vipo.credit.source import CreditError, CreditSource, Samples, Weights
from vipo.parts import load_part, told

_METHODS = ("set_up", "inputs", "before_rollout", "after_rollout", "__call__")


@dataclass(frozen=True)
class Credit:
    """Where the advantage of each sample goes.

    Attributes:
        weights: ``(N, [T,] H, W)`` float32, finite and not negative, or ``(N, S, [T,] H, W)`` where each of the S
            transitions has its own; None: nowhere in particular, the advantage is a scalar.
        metrics: what is logged of them.
        costs: of the sources, for each sample.
    """

    weights: Tensor | None
    metrics: Mapping[str, float]
    costs: Costs = field(default_factory=Costs)


def load_sources(config: CreditConfig) -> dict[str, CreditSource]:
    """The sources of a configuration by label (`CreditConfig.labels`), not set up yet.

    Raises:
        CreditError: an import path is none, or names no `CreditSource`.
        ConfigError: an option of an import path's source is wrong.
    """
    base: type[CreditSource] = CreditSource  # type: ignore[type-abstract]
    return {
        label: load_part(
            section, CREDIT_SOURCES, base, _METHODS, CreditError, "credit source", f"credit.sources.{place}"
        )
        for place, (label, section) in enumerate(zip(config.labels, config.sources, strict=True))
    }


def source_inputs(sources: Mapping[str, CreditSource], taken: Collection[str] = ()) -> dict[str, Path]:
    """What the sources, which are set up, read their weights from: a part of the run's identity.

    Args:
        sources: by name.
        taken: names of what else was read.

    Raises:
        CreditError: a source gives something else than paths by name, or a name that is taken: one of both files would
            be no part of the identity.
    """
    found: dict[str, Path] = {}
    for name, source in sources.items():
        own = source.inputs
        if not isinstance(own, Mapping) or not all(isinstance(path, Path) for path in own.values()):
            raise CreditError(f"credit source {name!r}: inputs: expected pathlib.Path by name, got {own!r}")
        # The same file read twice is one input.
        if twice := [key for key, path in own.items() if key in taken or found.get(key, path) != path]:
            raise CreditError(
                f"credit source {name!r}: inputs: {twice[0]!r} is the name of something else that is read; take another"
            )
        found |= own
    return found


def assign_credit(
    sources: Mapping[str, CreditSource],
    samples: Samples,
    control: Control = "none",
    seen: Mapping[str, Sequence[Any]] | None = None,
    mixture: Sequence[float] | None = None,
) -> Credit:
    """The sources' weights, multiplied or mixed, under a control; of the samples of all processes.

    Products of weights that are all divided by their mean are divided by theirs.

    Args:
        sources: by name.
        samples: of this process.
        control: around the product or mixture.
        seen: by name, what each source's `after_rollout` gave.
        mixture: None: they are multiplied; else their mean, weighted by these shares.

    Raises:
        CreditError: a source raised, or gave something that is no weights of these samples; the message names it.
    """
    if not sources:
        return Credit(None, {})
    given = [
        checked(name, source(replace(samples, seen=(seen or {}).get(name, ()))), samples)
        for name, source in sources.items()
    ]
    product = _combined(given, samples, mixture)
    values, constant, converged, groups = (
        samples.gather(part)
        for part in (
            product.values,
            _flags(product.constant, samples, False),
            _flags(product.converged, samples, True),
            samples.groups,
        )
    )
    permutations = None
    if control == "shuffled":
        positions = math.prod(samples.positions)
        drawn = [torch.randperm(positions, generator=generator) for generator in samples.draws("shuffle")]
        permutations = samples.gather(torch.stack(drawn).to(values.device))
    weights = controlled(control, values, constant, groups, mean_one=product.mean_one, permutations=permutations)
    return Credit(
        weights,
        {
            "map/mean": float(weights.mean()),
            "map/entropy": float(map_entropy(weights).mean()),
            "map/constant_share": float(constant.float().mean()),
            "map/unconverged_share": float((~converged).float().mean()),
        },
        functools.reduce(operator.add, [weights.costs for weights in given]),
    )


def checked(name: str, found: Any, samples: Samples) -> Weights:
    """What a source gave, as float32 on the samples' device.

    Raises:
        CreditError: it is no dense tensor of real numbers, has another shape, or holds a value that is negative or not
            finite.
    """
    called = f"credit source {name!r}"
    given = found if isinstance(found, Weights) else Weights(found)
    values = given.values
    if not isinstance(values, Tensor) or values.layout != torch.strided or not values.is_floating_point():
        layout = f", {values.layout}" if isinstance(values, Tensor) else ""
        raise CreditError(f"{called}: expected a dense tensor of floating point weights, got {told(values)}{layout}")
    shape = (len(samples), *samples.positions)
    steps = samples.trajectories[0].means.shape[1] if samples.trajectories else None
    own = (len(samples), values.shape[1] if steps is None and values.ndim > 1 else steps, *samples.positions)
    if tuple(values.shape) not in (shape, own):
        raise CreditError(
            f"{called}: expected weights of shape {shape}, or {own} where each transition has its own, got "
            f"{tuple(values.shape)}"
        )
    for flags in (given.constant, given.converged):
        if flags is None:
            continue
        if not isinstance(flags, Tensor) or flags.shape != shape[:1] or flags.dtype != torch.bool:
            raise CreditError(f"{called}: expected flags torch.bool of {shape[:1]}, got {told(flags)}")
    values = values.detach().as_subclass(Tensor).to(samples.clean.device, torch.float32)
    sound = (values >= 0) & values.isfinite()
    if not bool(sound.all()):
        row, *place = (int(i) for i in (~sound).nonzero()[0])
        raise CreditError(
            f"{called}: weights must be finite and not negative, but {float(values[row][tuple(place)])} stands at "
            f"{tuple(place)} of sample {samples.numbers[row]} of {samples.prompts[row].text!r}"
        )
    return replace(given, values=values)


def _combined(given: Sequence[Weights], samples: Samples, mixture: Sequence[float] | None) -> Weights:
    if len(given) == 1:
        return given[0]
    widest = max(weights.values.ndim for weights in given)
    aligned = [weights.values if weights.values.ndim == widest else weights.values.unsqueeze(1) for weights in given]
    if mixture is None:
        values = functools.reduce(torch.mul, aligned)
    else:
        shares = [share / sum(mixture) for share in mixture]
        values = functools.reduce(torch.add, [s * own for s, own in zip(shares, aligned, strict=True)])
    constant = torch.stack([_flags(weights.constant, samples, False) for weights in given]).all(dim=0)
    converged = torch.stack([_flags(weights.converged, samples, True) for weights in given]).all(dim=0)
    mean_one = all(weights.mean_one for weights in given)
    return Weights(divided_by_mean(values) if mean_one and mixture is None else values, constant, converged, mean_one)


def _flags(flags: Tensor | None, samples: Samples, default: bool) -> Tensor:
    if flags is None:
        return torch.full((len(samples),), default, device=samples.clean.device)
    return flags.to(samples.clean.device)


def map_entropy(weights: Tensor) -> Tensor:
    """Entropy of each sample's weights as a distribution, relative to the uniform one: ``(N,)`` in [0, 1]."""
    flat = weights.flatten(1).double()
    share = flat / flat.sum(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return -(torch.special.xlogy(share, share).sum(dim=1) / math.log(flat.shape[1])).float()
