"""The forward process's draws, and the policy that is kept beside the trained one."""

from collections import Counter

import pytest
import torch
from torch import nn

from vipo.sampling.forward import forward_steps
from vipo.training.old_policy import OldPolicy

KEYS = [(0, "forward", 1, "id", index) for index in range(200)]


def test_drawn_levels_are_different_ones_and_any() -> None:
    steps = forward_steps("drawn", KEYS, 4, 5)
    assert steps.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in steps.tolist())
    counts = Counter(steps.flatten().tolist())
    assert sorted(counts) == [0, 1, 2, 3, 4]
    # 160 each, standard deviation 5.7.
    assert all(abs(count - 160) < 30 for count in counts.values())
    assert torch.equal(forward_steps("drawn", KEYS[3:5], 4, 5), steps[3:5])
    assert sorted(forward_steps("drawn", KEYS[:1], 5, 5)[0].tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="count: 6 levels of a chain of 5"):
        forward_steps("drawn", KEYS, 6, 5)


@pytest.mark.parametrize(
    ("count", "steps", "pieces"),
    [
        # AWM's published setting: 14 steps, six levels; bounds 1, 2.8, 4.7, 6.5, 8.3, 10.2, 12, cut to whole numbers.
        (6, 14, [{1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]),
        (2, 4, [{1}, {2}]),
        (4, 4, [{1}, {1}, {2}, {2}]),
        (1, 2, [{1}]),
    ],
)
def test_stratified_levels_are_one_of_each_piece(count: int, steps: int, pieces: list[set[int]]) -> None:
    found = forward_steps("stratified", KEYS, count, steps)
    assert [set(column) for column in found.T.tolist()] == pieces
    assert torch.equal(forward_steps("stratified", KEYS[3:5], count, steps), found[3:5])


def test_the_old_policy_follows_and_takes_its_place() -> None:
    network = nn.Linear(2, 2, bias=False)
    trainable = dict(network.named_parameters())
    with torch.no_grad():
        network.weight.fill_(1.0)
    old, x = OldPolicy(network, trainable), torch.ones(1, 2)
    with torch.no_grad():
        network.weight.fill_(3.0)
    kept = network.weight.data_ptr()
    with old.instead():
        assert network(x).tolist() == [[2, 2]]
        assert float(old.tensors["weight"][0, 0]) == 3
    assert network(x).tolist() == [[6, 6]]
    with pytest.raises(RuntimeError, match="stopped"), old.instead():
        raise RuntimeError("stopped")
    assert network(x).tolist() == [[6, 6]]
    assert network.weight.data_ptr() == kept
    old.follow(0.75)
    assert old.tensors["weight"].unique().tolist() == [1.5]
    old.follow(0.0)
    assert torch.equal(old.tensors["weight"], network.weight)
    assert not old.tensors["weight"].requires_grad
