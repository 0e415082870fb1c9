"""Which samples and transitions an update takes, and that every tensor stays with its sample."""

import math
from dataclasses import fields
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vipo.config.training import TrainingConfig
from vipo.objectives import Advantages, best_and_worst
from vipo.prompts import Prompt
from vipo.sampling.rollout import Trajectory
from vipo.training import learn
from vipo.training.lesson import Lesson, Place
from vipo.training.samples import (
    MicroBatch,
    TrainingError,
    arrange_samples,
    chosen_transitions,
    concatenated,
    update_prompts,
)

PROMPTS = [Prompt(id=f"p{i}", text=f"prompt {i}", metadata={}) for i in range(7)]


def _training(choice: str, count: int, micro_batch: int = 1) -> TrainingConfig:
    return TrainingConfig(
        trained_transitions=count,
        transition_choice=choice,
        group_size=4,
        optimizer_steps_per_update=2,
        micro_batch=micro_batch,
    )


@given(count=st.integers(1, 7), seed=st.integers(0, 50))
def test_a_pass_draws_every_prompt_at_most_once(count: int, seed: int) -> None:
    per_pass = len(PROMPTS) // count
    for first in (1, per_pass + 1):
        drawn = [p.id for u in range(first, first + per_pass) for p in update_prompts(PROMPTS, seed, u, count)]
        assert len(drawn) == len(set(drawn)) == per_pass * count
    with pytest.raises(TrainingError, match="prompts_per_update 8 exceeds the 7"):
        update_prompts(PROMPTS, seed, 1, 8)


@given(prompts=st.integers(1, 5), share=st.integers(1, 4), steps=st.integers(1, 4))
def test_every_optimizer_step_holds_the_same_share_of_every_group(prompts: int, share: int, steps: int) -> None:
    samples = arrange_samples(PROMPTS[:prompts], share * steps, steps)
    assert {(s.group, s.index) for s in samples} == {(g, i) for g in range(prompts) for i in range(share * steps)}
    for step in range(steps):
        part = samples[step * prompts * share : (step + 1) * prompts * share]
        assert [s.group for s in part] == [g for g in range(prompts) for _ in range(share)]
        assert all(s.prompt == PROMPTS[s.group] for s in part)


@given(
    choice=st.sampled_from(["per_sample", "stratified", "shared", "first"]),
    start=st.integers(0, 5),
    size=st.integers(1, 9),
    data=st.data(),
    update=st.integers(1, 50),
)
def test_chosen_transitions_are_increasing_and_inside_the_window(
    choice: str, start: int, size: int, data: st.DataObject, update: int
) -> None:
    count = data.draw(st.integers(1, size))
    samples = arrange_samples(PROMPTS[:3], 4, 2)
    window = range(start, start + size)
    chosen = chosen_transitions(samples, _training(choice, count), window, 0, update)
    assert chosen.shape == (12, count)
    assert chosen.dtype == torch.int64
    assert set(chosen.flatten().tolist()) <= set(window)
    assert bool((chosen.diff(dim=1) > 0).all())
    if choice == "first":
        assert chosen.tolist() == [list(window[:count])] * 12
    if choice == "stratified":
        # One of each of `count` pieces of which the bounds are cut to whole steps.
        for piece in range(count):
            bounds = range(start + piece * size // count, start + (piece + 1) * size // count)
            assert set(chosen[:, piece].tolist()) <= set(bounds)
    if choice == "shared":
        assert bool((chosen == chosen[0]).all())
    # Keyed by the sample: the same whatever else is in the update.
    alone = chosen_transitions(samples[5:6], _training(choice, count), window, 0, update)
    assert torch.equal(alone[0], chosen[5])


def test_transitions_drawn_for_each_sample_differ_and_cover_the_window() -> None:
    samples = arrange_samples(PROMPTS, 4, 2)
    chosen = torch.cat(
        [chosen_transitions(samples, _training("per_sample", 2), range(2, 7), 0, u) for u in range(1, 41)]
    )
    counts = torch.bincount(chosen.flatten(), minlength=7)
    assert counts[:2].tolist() == [0, 0]
    expected = chosen.numel() / 5
    assert bool(((counts[2:] - expected).abs() < 5 * expected**0.5).all())
    assert len({tuple(row) for row in chosen.tolist()}) == 10


def _tagged(rows: list[int], size: int) -> list[MicroBatch]:
    """Micro-batches whose every tensor holds its row's number."""
    batches = []
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        tag = torch.tensor(own)

        def fill(*shape: int, tag: torch.Tensor = tag) -> torch.Tensor:
            return tag.float().reshape(-1, *([1] * len(shape))).expand(-1, *shape).clone()

        batches.append(
            MicroBatch(
                tuple(own),
                {"pooled": fill(5), "tokens": fill(3, 2)},
                Trajectory(fill(4, 2, 3, 3), fill(3, 2, 3, 3), fill(2, 3, 3)),
                tag[:, None].expand(-1, 2),
            )
        )
    return batches


@settings(deadline=None)
@given(groups=st.integers(1, 4), half=st.integers(1, 3), extra=st.integers(0, 2), data=st.data())
def test_selection_keeps_every_tensor_with_its_sample(groups: int, half: int, extra: int, data: st.DataObject) -> None:
    size, count = 2 * half + 2 * extra, 2 * half
    seed = data.draw(st.integers(0, 10_000))
    micro = data.draw(st.sampled_from([n for n in range(1, 9) if groups * size % n == groups * count % n == 0]))
    # Groups spread over the rows as the trainer spreads them, over two optimizer steps.
    group = torch.tensor([s.group for s in arrange_samples(PROMPTS[:groups], size, 2)])
    advantages = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed))
    ranked = best_and_worst(advantages, group, count)
    assert ranked.shape == (groups, count)
    for number, chosen in enumerate(ranked):
        own = sorted((float(advantages[i]), i) for i in range(groups * size) if int(group[i]) == number)
        assert chosen[1::2].tolist() == [i for _, i in own[:half]]
        assert chosen[0::2].tolist() == [i for _, i in own[::-1][:half]]
        assert len(set(chosen.tolist())) == count
    rows = ranked.flatten().tolist()
    whole = concatenated(_tagged(list(range(groups * size)), micro), lambda local: local)
    regrouped = [whole.select(rows[start : start + micro]) for start in range(0, len(rows), micro)]
    assert [row for batch in regrouped for row in batch.rows] == rows
    for batch in regrouped:
        assert len(batch.rows) == micro
        tensors = [
            *batch.conditioning.values(),
            *(getattr(batch.trajectory, f.name) for f in fields(Trajectory)),
            batch.steps,
        ]
        for tensor in tensors:
            flat = tensor.flatten(1).long()
            assert flat.tolist() == [[row] * flat.shape[1] for row in batch.rows]


def test_equal_advantages_are_ordered_by_row() -> None:
    groups = torch.tensor([0, 0, 0, 0])
    assert best_and_worst(torch.zeros(4), groups, 2).tolist() == [[0, 3]]
    assert best_and_worst(torch.tensor([1.0, 2.0, 2.0, 1.0]), groups, 4).tolist() == [[1, 3, 2, 0]]


@pytest.mark.parametrize("count", [3, 6])
def test_selection_refuses_what_is_odd_or_too_many(count: int) -> None:
    with pytest.raises(ValueError, match=f"count: {count} must be even and at most the group size 4"):
        best_and_worst(torch.zeros(4), torch.zeros(4, dtype=torch.int64), count)


class _Indexed(Tensor):
    """Notes what it is indexed by."""

    asked: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            cls.asked.append(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("shape", "by_transition"), [((), False), ((3,), True), ((2, 2), False), ((3, 2, 2), True)])
def test_the_advantages_of_a_loss_are_picked_by_indices_that_are_on_the_device_before_it(
    shape: tuple[int, ...], by_transition: bool
) -> None:
    whole, steps = torch.arange(float(6 * math.prod(shape))).reshape(6, *shape), torch.tensor([2, 0])
    chains = Trajectory(*(torch.zeros(2, 4, 1, 2, 2) for _ in range(2)), torch.zeros(2, 1, 2, 2))
    batches = [MicroBatch(rows, {}, chains, steps[:, None]) for rows in ((3, 1), (0, 5))]
    indexed = whole.as_subclass(_Indexed)
    lesson = Lesson(1, batches, Advantages(indexed, whole[:, 0] if by_transition else whole, indexed), [])
    _Indexed.asked.clear()
    for _ in range(2):
        found = learn._advantages(lesson, Place(1, 0, 0), steps)
        expected = torch.stack([whole[0, 2], whole[5, 0]]) if by_transition else whole[[0, 5]]
        assert found.weights is not None
        assert torch.equal(found.values.as_subclass(Tensor), expected)
        assert torch.equal(found.weights.as_subclass(Tensor), expected)
    # A list, or a tensor that is elsewhere, would be copied to the device, and the host would wait, at every loss.
    parts = [part for asked in _Indexed.asked for part in (asked if isinstance(asked, tuple) else (asked,))]
    assert len(parts) == (8 if by_transition else 4)
    assert {id(part) for part in parts} == {id(part) for part in (lesson.rows[1], *([steps] * by_transition))}
