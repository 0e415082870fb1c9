"""The comparisons, each a function of a `Subject`: predictions, samples, gradients and precision."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vipo.conformance.subject import Lesson, Subject, lesson, loss_of
from vipo.generators.base import GeneratorError
from vipo.generators.pipeline import PipelineGenerator
from vipo.objectives import Points
from vipo.sampling.rollout import sample_ode
from vipo.training.joined import predict_joined

EXACT = 1e-5
"""Of a prediction, absolutely; a sample adds up the rounding of so many steps."""
_RECOMPUTED, _SPREAD = 1e-6, 1e-4
_ROUNDED = 0.1


@dataclass(frozen=True)
class Finding:
    """What came of one comparison.

    Attributes:
        name: what was compared.
        result: whether it holds, or why there is none.
        found: the largest deviation, where one is measured.
        limit: that it must not exceed.
        note: what else there is to say.
        names: of tensors, where the note counts some.
    """

    name: str
    result: Literal["ok", "fails", "does not apply"]
    found: float | None = None
    limit: float | None = None
    note: str = ""
    names: tuple[str, ...] = ()


def finding(name: str, found: float, limit: float, faults: Iterable[str] = (), names: Iterable[str] = ()) -> Finding:
    """A comparison that holds where `found` is not above `limit` and there are no `faults`; NaN is above."""
    told = "; ".join(faults)
    return Finding(name, "ok" if found <= limit and not told else "fails", found, limit, told, tuple(names))


def largest(value: Tensor) -> float:
    """The largest magnitude; of what is not finite, infinity."""
    return float(value.detach().abs().nan_to_num(nan=float("inf")).max())


def prediction(compared: Subject) -> list[Finding]:
    """Our first prediction is the stock pipeline's."""
    generator, sampled = compared.load(), compared.sampled
    with torch.no_grad():
        own = generator.predict(compared.noise, sampled.times(generator), compared.conditioning)
    return [finding("first prediction", largest(own - sampled.prediction), EXACT)]


def sample(compared: Subject) -> list[Finding]:
    """Our deterministic sample is the stock pipeline's over the same levels."""
    generator, sampled = compared.load(), compared.sampled
    own = deterministic_sample(generator, compared)
    faults = [] if float(own.std()) > 0 else ["the pictures are of one colour"]
    limit = EXACT * compared.steps
    return [finding("deterministic sample", largest(own - sampled.pictures), limit, faults)]


def deterministic_sample(generator: PipelineGenerator, compared: Subject) -> Tensor:
    """Pictures ``(B, *sample_shape)`` of the subject's noise over the stock scheduler's levels."""
    chain = compared.sampled.chain(generator)
    return generator.pictures(sample_ode(generator, compared.conditioning, chain, compared.noise))


def joined(compared: Subject) -> list[Finding]:
    """Two transitions of every sample in one call are predicted as each transition is alone."""
    generator = compared.load()
    taught = lesson(generator, compared)
    steps = [torch.full((len(compared.noise),), step, device=generator.device) for step in (0, 2)]
    points = [Points(taught.path.at(step)[0], taught.chain.times[step]) for step in steps]
    with torch.no_grad():
        together = predict_joined(generator, points, compared.conditioning)
        alone = [generator.predict(each.latents, each.times, compared.conditioning) for each in points]
    apart = max(largest(one - other) for one, other in zip(together, alone, strict=True))
    return [finding("joined transitions", apart, EXACT * max(1.0, *map(largest, alone)))]


def gradients(compared: Subject) -> list[Finding]:
    """Gradients are the same recomputed (gradient checkpointing), and by halves: each process's share, averaged."""
    generator = compared.load("full")
    taught = lesson(generator, compared)
    rows = list(range(len(compared.noise)))
    whole = _gradients(generator, compared, taught, [rows])
    scale = max(map(largest, whole.values()))
    faults = [] if 0 < scale < float("inf") else [f"the largest gradient is {scale:g}"]
    halves = _gradients(generator, compared, taught, [[row] for row in rows])
    spread = finding("gradients of single samples, averaged", _apart(whole, halves), _SPREAD * scale, faults)
    del halves
    name = "gradient checkpointing"
    try:
        generator.recompute_activations()
    except GeneratorError as error:
        return [spread, Finding(name, "does not apply", note=str(error))]
    for part, network in generator.networks.items():
        if not any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
            faults.append(f"no module of {part} is recomputed")
    recomputed = _gradients(generator, compared, taught, [rows])
    return [spread, finding(name, _apart(whole, recomputed), _RECOMPUTED * scale, faults)]


def _gradients(
    generator: PipelineGenerator, compared: Subject, taught: Lesson, parts: list[list[int]]
) -> dict[str, Tensor]:
    for part in parts:
        given = {name: value[part] for name, value in compared.conditioning.items()}
        (loss_of(taught.select(part).log_ratios(generator, given)) / len(parts)).backward()
    found = {name: value.grad for name, value in generator.network.named_parameters() if value.grad is not None}
    generator.network.zero_grad(set_to_none=True)
    return found


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    if one.keys() != other.keys():
        return float("inf")
    return max(largest(value - other[name]) for name, value in one.items())


def bf16(compared: Subject) -> list[Finding]:
    """Under autocast the prediction is close to the fp32 one, and the same with gradients as without."""
    generator, expected = compared.load("full", precision="bf16"), compared.sampled.prediction
    time = compared.sampled.times(generator)
    with torch.no_grad():
        sampled = generator.predict(compared.noise, time, compared.conditioning)
    learned = generator.predict(compared.noise, time, compared.conditioning)
    faults = [] if torch.equal(sampled, learned.detach()) else ["with gradients its bits are others"]
    learned.square().mean().backward()
    if not all(value.grad is None or value.grad.isfinite().all() for value in generator.network.parameters()):
        faults.append("a gradient is not finite")
    error = float((sampled - expected).norm() / expected.norm())
    if error < EXACT:
        faults.append("nothing is computed in bf16")
    return [finding("bf16, relative to fp32", error, _ROUNDED, faults)]
