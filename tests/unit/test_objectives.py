"""Advantages, maps and the surrogate against closed forms, SciPy and finite differences."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from vipo.objectives import allocate_advantages, clipped_surrogate, group_advantages, weight_maps


def _groups(groups: int, size: int) -> Tensor:
    return torch.arange(groups).repeat_interleave(size)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4), size=st.integers(2, 9))
def test_advantages_are_z_scores_within_the_group(seed: int, groups: int, size: int) -> None:
    rewards = torch.rand(groups * size, generator=torch.Generator().manual_seed(seed))
    result = group_advantages({"r": rewards}, {"r": 1.0}, _groups(groups, size), std_floor=0.0, clip=1e9)
    expected = stats.zscore(rewards.double().numpy().reshape(groups, size), axis=1, ddof=1).ravel()
    np.testing.assert_allclose(result.values.numpy(), expected, atol=1e-4)
    assert not bool(result.zero_std.any())


def test_equal_rewards_give_no_gradient_and_are_counted() -> None:
    rewards = torch.tensor([0.3, 0.3, 0.3, 0.1, 0.2, 0.3])
    result = group_advantages({"r": rewards}, {"r": 1.0}, _groups(2, 3), std_floor=1e-4, clip=5)
    assert result.values[:3].tolist() == [0, 0, 0]
    assert result.zero_std.tolist() == [True, False]
    assert float(result.group_std[1]) == pytest.approx(0.1, rel=1e-5)


def test_not_finite_rewards_leave_their_group() -> None:
    rewards = torch.tensor([1.0, float("nan"), 3.0, 1.0, float("inf"), 3.0])
    result = group_advantages({"r": rewards}, {"r": 1.0}, _groups(2, 3), std_floor=0.0, clip=5)
    assert result.valid.tolist() == [True, False, True, True, False, True]
    np.testing.assert_allclose(result.values, [-(0.5**0.5), 0, 0.5**0.5] * 2, rtol=1e-6)


def test_several_rewards_are_normalised_before_they_are_weighted() -> None:
    a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([500.0, 0.0, 1000.0])
    result = group_advantages({"a": a, "b": b}, {"a": 1.0, "b": 2.0}, _groups(1, 3), std_floor=0.0, clip=1e9)
    np.testing.assert_allclose(result.values, [-1 + 0, 0 - 2, 1 + 2], atol=1e-6)


def test_advantages_are_clipped_before_the_map() -> None:
    rewards = torch.cat([torch.zeros(63), torch.ones(1)])
    result = group_advantages({"r": rewards}, {"r": 1.0}, _groups(1, 64), std_floor=1e-4, clip=5)
    assert float(result.values.max()) == 5


def test_maps_weight_and_never_flip() -> None:
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -2.0, 0.0])
    spread = allocate_advantages(advantages, maps)
    torch.testing.assert_close(spread, maps * advantages[:, None, None])
    with pytest.raises(ValueError, match="negative"):
        allocate_advantages(advantages, maps - 1)
    with pytest.raises(ValueError, match="expected 3 maps"):
        allocate_advantages(advantages, maps[:2])


def test_controls_of_the_map() -> None:
    maps = torch.tensor([[[0.0, 0.25], [0.5, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    constant, groups = torch.tensor([False, True]), torch.tensor([0, 0])
    assert torch.equal(weight_maps("psm", maps, constant, "minmax", groups), maps)
    assert torch.equal(weight_maps("uniform", maps, constant, "minmax", groups), torch.ones_like(maps))
    inverted = weight_maps("inverted", maps, constant, "minmax", groups)
    assert torch.equal(inverted[0], 1 - maps[0])
    assert torch.equal(inverted[1], maps[1])
    mean_one = maps / maps.mean(dim=(1, 2), keepdim=True)
    inverted = weight_maps("inverted", mean_one, constant, "mean", groups)
    torch.testing.assert_close(inverted.mean(dim=(1, 2)), torch.ones(2))


OPTIONS = [
    {"ratio": ratio, "side": side, "scope": scope}
    for ratio, side, scope in itertools.product(
        ("sample", "position"), ("ppo", "symmetric", "none"), ("sample", "position")
    )
    if not (ratio == "sample" and scope == "position")
]


def _batch(seed: int, ratio: str, scale: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    new = old + scale * torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    shape = (5, 3, 4) if ratio == "position" else (5,)
    return new, old, torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("seed", range(4))
def test_gradient_equals_finite_differences(options: dict[str, str], seed: int) -> None:
    new, old, advantages = _batch(seed, options["ratio"])
    clip_range = 0.01 if options["scope"] == "position" else 0.004

    def loss(values: Tensor) -> Tensor:
        return clipped_surrogate(values - old, advantages, clip_range=clip_range, **options).loss

    # Beyond the range the loss is flat, inside it is the ratio: differentiable wherever no gate flips.
    assert torch.autograd.gradcheck(loss, new.clone().requires_grad_(), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("ratio", ["sample", "position"])
def test_ppo_side_is_the_published_minimum(ratio: str) -> None:
    new, old, advantages = _batch(3, ratio)
    eps = 0.004
    found = clipped_surrogate(new - old, advantages, ratio=ratio, side="ppo", scope=ratio, clip_range=eps).loss
    rho = (new - old).exp() if ratio == "position" else (new - old).mean(dim=(1, 2)).exp()
    expected = -torch.minimum(rho * advantages, rho.clamp(1 - eps, 1 + eps) * advantages).mean()
    torch.testing.assert_close(found, expected)


def test_uniform_and_grpo_give_the_same_gradient_at_ratio_one() -> None:
    new, _, advantages = _batch(0, "sample")
    gradients = []
    for ratio, spread in (("sample", advantages), ("position", advantages[:, None, None].expand(5, 3, 4))):
        values = new.clone().requires_grad_()
        surrogate = clipped_surrogate(values - new, spread, ratio=ratio, side="ppo", scope="sample", clip_range=1e-4)
        gradients.append(torch.autograd.grad(surrogate.loss, values)[0])
        assert float(surrogate.clipped.sum()) == 0
    torch.testing.assert_close(*gradients)


def test_position_clip_drops_what_agrees_with_the_last_step() -> None:
    """METHOD section 8: the one-sided gate keeps the positions that oppose the step already taken."""
    old = torch.zeros(1, 1, 4)
    new = torch.tensor([[[0.1, 0.1, -0.1, -0.1]]])
    advantages = torch.ones(1, 1, 4)
    values = new.clone().requires_grad_()
    result = clipped_surrogate(
        values - old, advantages, ratio="position", side="ppo", scope="position", clip_range=0.01
    )
    (gradient,) = torch.autograd.grad(result.loss, values)
    assert (gradient != 0).tolist() == [[[False, False, True, True]]]
    assert result.clipped.tolist() == [0.5]


def test_surrogate_checks_shapes() -> None:
    new, old, advantages = _batch(0, "position")
    with pytest.raises(ValueError, match=r"advantages: expected shape \(5,\) for ratio 'sample', got \(5, 3, 4\)"):
        clipped_surrogate(new - old, advantages, ratio="sample", side="ppo", scope="sample", clip_range=0.1)
    with pytest.raises(ValueError, match=r"weights: expected shape \(5,\) of the batch, got \(3,\)"):
        clipped_surrogate(
            new - old,
            advantages,
            ratio="position",
            side="ppo",
            scope="sample",
            clip_range=0.1,
            weights=torch.ones(3),
        )
    with pytest.raises(ValueError, match="weights: expected the rewards"):
        group_advantages({"a": torch.ones(2)}, {"b": 1.0}, torch.zeros(2, dtype=torch.int64), 1e-4, 5)
