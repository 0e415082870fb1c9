"""Keyed noise: the determinism contract."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vipo.sampling.noise import Key, keyed_generator, keyed_normal, keyed_seed

PARTS = st.one_of(st.integers(), st.text(max_size=8))
KEYS = st.tuples(PARTS, PARTS, PARTS)


def _keys(count: int) -> list[Key]:
    return [(0, "step", 3, f"prompt-{i % 2}", i) for i in range(count)]


def test_noise_is_the_same_for_every_batch_size() -> None:
    keys = _keys(8)
    whole = keyed_normal(keys, (2, 3, 3))
    for size in (1, 3, 8):
        pieces = [keyed_normal(keys[i : i + size], (2, 3, 3)) for i in range(0, 8, size)]
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(keyed_normal(keys[::-1], (2, 3, 3)), whole.flip(0))


def test_noise_differs_by_every_part_of_the_key() -> None:
    base: Key = (0, "step", 3, "prompt", 1)
    others: list[Key] = [
        (1, "step", 3, "prompt", 1),
        (0, "initial", 3, "prompt", 1),
        (0, "step", 4, "prompt", 1),
        (0, "step", 3, "other", 1),
        (0, "step", 3, "prompt", 2),
    ]
    draws = keyed_normal([base, *others], (64,))
    assert len({tuple(draw.tolist()) for draw in draws}) == 6
    off_diagonal = torch.corrcoef(draws) - torch.eye(6)
    assert off_diagonal.abs().max() < 0.5


def test_noise_is_float32_of_the_asked_shape_and_normal() -> None:
    draws = keyed_normal(_keys(40), (5, 20))
    assert draws.shape == (40, 5, 20)
    assert draws.dtype == torch.float32
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 0.01


def test_a_draw_is_torch_s_own_and_goes_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without one can tell: what is asked for, not that the host does not wait."""
    expected = torch.stack([torch.randn((3, 7), generator=keyed_generator(*key)) for key in _keys(2)])
    asked: list[object] = []
    plain, copied = torch.empty, torch.Tensor.to

    def empty(*size: int, pin_memory: bool, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return plain(*size, **options)

    def to(value: torch.Tensor, device: torch.device | str, **options: Any) -> torch.Tensor:
        asked.append((str(device), options))
        return copied(value, "cpu")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for device, pinned in (("cpu", False), ("cuda", True), (torch.device("cuda:1"), True)):
        asked.clear()
        assert torch.equal(keyed_normal(_keys(2), (3, 7), device), expected)
        assert asked == [pinned, (str(device), {"non_blocking": True})]


def test_seed_is_the_documented_hash() -> None:
    digest = hashlib.blake2b(b'[7,"initial",0,"\\u00e9",2]', digest_size=8).digest()
    assert keyed_seed(7, "initial", 0, "é", 2) == int.from_bytes(digest, "big") >> 1


@given(KEYS, KEYS)
def test_seeds_agree_exactly_where_keys_do(one: Key, other: Key) -> None:
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (keyed_seed(*one) == keyed_seed(*other)) == same
    assert 0 <= keyed_seed(*one) < 2**63


@pytest.mark.parametrize(
    ("one", "other"), [((1, "1"), ("1", 1)), (("a", "b"), ("ab",)), (("a,b",), ("a", "b")), ((1, 2), (12,))]
)
def test_keys_that_look_alike_do_not_collide(one: Key, other: Key) -> None:
    assert keyed_seed(*one) != keyed_seed(*other)


@pytest.mark.parametrize("part", [1.0, None, True, b"x", (1,), np.int64(1)])
def test_other_types_are_refused_by_name(part: object) -> None:
    with pytest.raises(TypeError, match="neither an integer nor a string"):
        keyed_seed(0, part)  # type: ignore[arg-type]


def test_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), keyed_normal(_keys(2), (4,))
    torch.manual_seed(1)
    assert torch.equal(keyed_normal(_keys(2), (4,)), first)
    torch.manual_seed(0)
    keyed_generator(0, "x")
    assert torch.equal(torch.get_rng_state(), before)
