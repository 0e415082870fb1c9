"""The measurement: the reference gradient, then one update after another; each part is a file, so that it resumes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from vipo.credit.meter.directions import Directions, Kind
from vipo.credit.meter.gradients import (
    MeterError,
    flat,
    pathwise_gradients,
    total_gradient,
    update_gradients,
)
from vipo.credit.meter.held_out import HeldOut, take_steps
from vipo.credit.meter.plan import Plan, Record, Reference
from vipo.credit.meter.result import summarise
from vipo.credit.meter.space import Space, Whole, products
from vipo.credit.meter.subject import (
    Group,
    Placed,
    Subject,
    chain_rewards,
    drawn_prompts,
    sample_chains,
    sample_group,
)
from vipo.prompts import Prompt
from vipo.provenance.files import damaged_part
from vipo.provenance.parts import load_json, load_tensors, save_json, save_tensors

Part = TypeVar("Part")


def measure_reference(
    subject: Subject, prompts: Sequence[Prompt], plan: Plan, space: Space, folder: Path, advance: Callable[[], None]
) -> Reference:
    """The pathwise gradient over `plan.reference_batches`, from where an earlier process stopped.

    Args:
        prompts: held-out ones; their order is keyed, and they are taken again, with other noise, when all were.
        folder: of the measurement; nothing else lies in it.
        advance: called after each batch.
    """
    blocks = min(plan.blocks, plan.reference_batches)
    sums = torch.zeros(blocks, space.size, device=subject.generator.device)
    counts = [0] * blocks
    for block in range(blocks):
        most = len(range(block, plan.reference_batches, blocks))
        whole = partial(_block, size=space.size, most=most)
        if (kept := read_part(folder / f"reference-{block}.safetensors", whole)) is not None:
            counts[block] = int(kept["batches"])
            sums[block] = kept["sum"].to(sums.device)
    for number in range(plan.reference_batches):
        block = number % blocks
        if counts[block] <= number // blocks:
            sums[block] += space(_pathwise(subject, prompts, number))
            counts[block] += 1
            part = {"sum": sums[block].cpu(), "batches": torch.tensor(counts[block])}
            save_tensors(part, folder / f"reference-{block}.safetensors")
        advance()
    return Reference(sums / torch.tensor(counts, device=sums.device)[:, None], counts)


def read_part(path: Path, read: Callable[[Path], Part]) -> Part | None:
    """What an earlier process measured; None where that is nothing, or a damaged file: it is measured again then, to
    the same bytes."""
    if path.is_file():
        with damaged_part(path):
            return read(path)
    return None


def _block(path: Path, size: int, most: int) -> dict[str, Tensor]:
    kept = load_tensors(path)
    found, batches = kept["sum"], kept["batches"]
    if found.dtype != torch.float32 or found.shape != (size,) or not bool(found.isfinite().all()):
        raise ValueError("it holds no sum of gradients")
    if batches.shape != () or not 1 <= int(batches) <= most:
        raise ValueError("it is of no such number of batches")
    return kept


def _record(
    path: Path, layout: tuple[list[str], ...], stepped: bool, first: Sequence[Record], reference: Reference | None
) -> Record:
    """Of an update along whose directions steps were taken, or not; one that goes with the first one's record.

    Args:
        layout: its sources, and of each the kinds of directions and the transitions.
    """
    record: Record = load_json(path)
    names, *each = layout
    if list(record["sources"]) != names or any(
        [list(own["kinds"]), list(own["steps"])] != each for own in record["sources"].values()
    ):
        raise ValueError("it is of other sources, directions or transitions")
    if record["rewards"] is None or stepped != ("change" in record):
        raise ValueError("it is of no such update")
    # Whatever it lacks, its readers would find out when all updates are measured.
    summarise([*first, record], reference)
    return record


def _pathwise(subject: Subject, prompts: Sequence[Prompt], number: int) -> Tensor:
    parameters, size = list(subject.parameters.values()), subject.group_size
    chosen = drawn_prompts(prompts, subject.seed, "reference", number * size, size)
    # Not siblings: samples of other prompts and noise say more of the expected reward than those of one group.
    batches = sample_chains(subject, "reference", number, list(zip(chosen, range(size), strict=True)))
    total = torch.zeros(subject.size, device=subject.generator.device)
    for batch in batches:
        by_clean = total_gradient(subject.generator, batch, subject.rewards, subject.weights)
        swept = pathwise_gradients(subject.generator, batch, subject.chain, subject.stochastic, parameters, by_clean)
        for _, own in swept:
            total.add_(flat(own), alpha=len(batch.rows) / size)
    if not bool(total.isfinite().all()):
        named = ", ".join(repr(prompt.text) for prompt in chosen)
        raise MeterError(f"the gradient of the reward is not finite for one of the samples of {named}")
    return total


def check_space(space: Space, kinds: Sequence[Kind], plan: Plan) -> None:
    """Refuse a sketch where whole gradients are needed; before the reference, which is the longest part.

    Raises:
        MeterError: it is one, and signs or steps are asked for.
    """
    if not isinstance(space, Whole) and (plan.stepped or list(kinds) != ["sgd"]):
        raise MeterError(
            "experiment.meter.memory_mb: the gradients are sketched, of which no sign and no step can be taken; raise "
            "it, name fewer arms, or set experiment.meter.directions=[sgd] and experiment.meter.stepped=0"
        )


def measure_updates(
    subject: Subject,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    names: Sequence[str],
    placed: Placed,
    directions: Directions,
    plan: Plan,
    space: Space,
    reference: Reference | None,
    folder: Path,
    advance: Callable[[Sequence[Record]], None],
) -> list[Record]:
    """Every update's directions against the reference, and the rewards after a step along them.

    Args:
        prompts: training ones; their order is keyed.
        held_out: whose rewards are compared.
        names: of the sources.
        placed: what they give, by name.
        directions: what steps are made of gradients.
        space: a sketch keeps no signs and takes no steps: 'sgd' alone is measured then.
        reference: None: no pathwise estimator.
        folder: as of `measure_reference`.
        advance: called after each update with the records so far.

    Raises:
        MeterError: the plan needs whole gradients and `space` is a sketch; or a gradient is not finite.
    """
    check_space(space, directions.kinds, plan)
    records: list[Record] = []
    tested: HeldOut | None = None
    layout = (list(names), list[str](directions.kinds), [str(step) for step in subject.trained])
    for number in range(plan.updates):
        path = folder / f"update-{number}.json"
        stepped = number < plan.stepped
        whole = partial(_record, layout=layout, stepped=stepped, first=records[:1], reference=reference)
        if (kept := read_part(path, whole)) is not None:
            records.append(kept)
        else:
            record, gradients = _update(subject, prompts, placed, directions, plan, space, reference, number)
            if stepped:
                tested = tested or HeldOut(subject, held_out, plan)
                known = next((old["change"] for old in records if old.get("change")), plan.change)
                take_steps(record, gradients, directions, tested, reference, known)
            save_json(record, path)
            records.append(record)
        advance(records)
    return records


def _update(
    subject: Subject,
    prompts: Sequence[Prompt],
    placed: Placed,
    directions: Directions,
    plan: Plan,
    space: Space,
    reference: Reference | None,
    number: int,
) -> tuple[Record, dict[str, Tensor]]:
    first = number * plan.update_groups
    chosen = drawn_prompts(prompts, subject.seed, "update", first, plan.update_groups)
    groups = [sample_group(subject, "update", first + place, prompt) for place, prompt in enumerate(chosen)]
    advantages = placed(groups)
    whole = {name: torch.zeros(space.size, device=subject.generator.device) for name in advantages}
    steps: dict[str, Record] = {name: {} for name in advantages}
    for step in subject.trained:
        own = _transition(subject, groups, advantages, step, space)
        told = None if reference is None else products(list(own.values()), reference.means).tolist()
        for row, (name, added) in enumerate(own.items()):
            whole[name] += added
            steps[name][str(step)] = {"norm": _length(added)} | ({} if told is None else {"products": told[row]})
    sources: dict[str, Record] = {}
    for name, gradient in whole.items():
        if not bool(gradient.isfinite().all()):
            raise MeterError(f"update {number}: the gradient of source {name!r} is not finite")
        kinds = {kind: _against(directions(kind, gradient), reference) for kind in directions.kinds}
        sources[name] = {"norm": _length(gradient), "kinds": kinds, "steps": steps[name]}
    rewards = chain_rewards(subject, [batch for group in groups for batch in group.batches])
    record = {
        "update": number,
        "prompts": [prompt.id for prompt in chosen],
        "rewards": {name: _finite_mean(values) for name, values in rewards.items()},
        "sources": sources,
    }
    return record, whole


def _transition(
    subject: Subject, groups: Sequence[Group], advantages: Mapping[str, Tensor], step: int, space: Space
) -> dict[str, Tensor]:
    """What one transition of all samples adds to the update's mean, by source."""
    device, parameters = subject.generator.device, list(subject.parameters.values())
    own = {name: torch.zeros(space.size, device=device) for name in advantages}
    for position, group in enumerate(groups):
        for batch in group.batches:
            rows = [position * subject.group_size + row for row in batch.rows]
            here = {
                name: values[rows, step if values.shape[1] > 1 else 0].to(device) for name, values in advantages.items()
            }
            share = len(rows) / (subject.group_size * len(groups) * len(subject.trained))
            found = update_gradients(
                subject.generator,
                batch,
                subject.chain,
                step,
                parameters,
                here,
                channels=subject.channels,
                density=subject.density,
            )
            for name, gradient in found:
                own[name].add_(space(flat(gradient)), alpha=share)
    return own


def _against(direction: Tensor, reference: Reference | None) -> Record:
    length = _length(direction)
    if reference is None:
        return {"length": length}
    along = products(direction[None], reference.means)[0]
    return {"length": length, "products": (along / length if length > 0 else torch.zeros_like(along)).tolist()}


def _length(vector: Tensor) -> float:
    return float(vector.double().norm())


def _finite_mean(values: Tensor) -> float | None:
    kept = values[values.isfinite()].double()
    return float(kept.mean()) if len(kept) else None
