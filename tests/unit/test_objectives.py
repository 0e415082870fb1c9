"""Advantages, maps and the surrogate against closed forms, SciPy and finite differences."""

import itertools
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from vipo.config.objective import NoGateConfig, PpoGateConfig, SymmetricGateConfig
from vipo.credit.controls import controlled
from vipo.demo.scenes import IMAGE_SIZE
from vipo.demo.seen import object_coverage
from vipo.objectives import Moved, allocate_advantages, group_advantages, load_gate, step_advantages
from vipo.objectives.surrogate import GatedLoss, gated_surrogate, normalized_log_ratio
from vipo.sampling.transitions import position_kl, position_log_prob


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


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("places", [(3, 4), (2, 3, 4)])
def test_equal_rewards_give_no_gradient_whatever_their_maps(places: tuple[int, ...], std: str) -> None:
    maps = torch.rand(9, *places, generator=torch.Generator().manual_seed(0))
    # The first group's rewards are equal, and the last one's are but for a sample without any.
    rewards = torch.tensor([0.7, 0.7, 0.7, 0.1, 0.2, 0.3, 0.7, float("nan"), 0.7])
    result = group_advantages({"r": rewards}, {"r": 1.0}, _groups(3, 3), 1e-4, 5, std=std, credit=maps)
    assert result.zero_std.tolist() == [True, False, True]
    assert result.values.abs().flatten(1).amax(dim=1).gt(0).tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert result.group_std.gt(0).tolist() == [False, True, False]
    # Of two rewards, the one that differs alone decides.
    other = torch.rand(9, generator=torch.Generator().manual_seed(1))
    both = group_advantages(
        {"r": rewards.nan_to_num(0.7), "o": other}, {"r": 3.0, "o": 1.0}, _groups(3, 3), 1e-4, 5, std=std, credit=maps
    )
    alone = group_advantages({"o": other}, {"o": 1.0}, _groups(3, 3), 1e-4, 5, std=std, credit=maps)
    assert not bool(both.zero_std.any())
    for group in (slice(0, 3), slice(6, 9)):
        assert torch.equal(both.values[group], alone.values[group])


def test_not_finite_rewards_leave_their_group() -> None:
    rewards = torch.tensor([1.0, float("nan"), 3.0, 1.0, float("inf"), 3.0])
    result = group_advantages({"r": rewards}, {"r": 1.0}, _groups(2, 3), std_floor=0.0, clip=5)
    assert result.valid.tolist() == [True, False, True, True, False, True]
    np.testing.assert_allclose(result.values, [-(0.5**0.5), 0, 0.5**0.5] * 2, rtol=1e-6)


def test_several_rewards_are_normalised_before_they_are_weighted() -> None:
    a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([500.0, 0.0, 1000.0])
    result = group_advantages({"a": a, "b": b}, {"a": 1.0, "b": 2.0}, _groups(1, 3), std_floor=0.0, clip=1e9)
    np.testing.assert_allclose(result.values, [-1 + 0, 0 - 2, 1 + 2], atol=1e-6)


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_rewards_that_are_combined_first_are_one_reward(std: Literal["group", "batch", "none"]) -> None:
    """Flow-GRPO: a reward of a larger scale weighs more; one without a value leaves its sample out."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(8, generator=generator), 30 * torch.rand(8, generator=generator)
    b[5] = torch.nan
    rewards, weights, rest = {"a": a, "b": b}, {"a": 0.7, "b": 0.3}, (_groups(2, 4), 1e-3, 1e9, std)
    found = group_advantages(rewards, weights, *rest, combine="rewards")
    one = group_advantages({"sum": 0.7 * a.double() + 0.3 * b.double()}, {"sum": 1.0}, *rest)
    torch.testing.assert_close(found.values, one.values)
    assert found.valid.tolist() == [row != 5 for row in range(8)]
    total = (0.7 * a.double() + 0.3 * b.double()).numpy()
    centred = total[:4] - total[:4].mean()
    spread = {"group": total[:4].std(ddof=1), "batch": np.nanstd(total), "none": 1 - 1e-3}[std]
    np.testing.assert_allclose(found.values[:4], centred / (spread + 1e-3), rtol=1e-5)
    # Chains that won half of it in their only step.
    chains = {name: torch.stack([reward / 2, reward], dim=1) for name, reward in rewards.items()}
    steps = step_advantages(chains, weights, *rest, combine="rewards").values[:, 0]
    divisor = 1 if std == "none" else spread / 2 + 1e-3
    np.testing.assert_allclose(steps[:4], centred / 2 / divisor, rtol=1e-4)


def test_without_a_divisor_an_advantage_is_the_difference_to_the_mean() -> None:
    """Dr. GRPO: groups whose rewards differ more teach more; floor and spread play no part."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 4.0])
    found = group_advantages({"r": rewards}, {"r": 2.0}, _groups(2, 2), std_floor=0.3, clip=3, std="none")
    assert found.values.tolist() == [-1, 1, -3, 3]


def test_advantages_are_clipped_before_the_map() -> None:
    rewards = torch.cat([torch.zeros(63), torch.ones(1)])
    result = group_advantages({"r": rewards}, {"r": 1.0}, _groups(1, 64), std_floor=1e-4, clip=5)
    assert float(result.values.max()) == 5


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4), size=st.integers(2, 9))
def test_batch_std_is_the_populations_over_the_update(seed: int, groups: int, size: int) -> None:
    """Flow-GRPO: the group's mean, NumPy's std (ddof 0) of all samples; a sample without a reward is in neither."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(groups * size, generator=generator)
    lost = int(torch.randint(groups * size, (), generator=generator))
    rewards[lost] = torch.nan
    result = group_advantages({"r": rewards}, {"r": 2.0}, _groups(groups, size), std_floor=0.01, clip=1e9, std="batch")
    values = rewards.double().numpy().reshape(groups, size)
    centred = values - np.nanmean(values, axis=1, keepdims=True)
    expected = np.nan_to_num(2 * centred / (np.nanstd(values) + 0.01)).ravel()
    # A group of one valid sample has no statistics.
    few = np.repeat(np.isfinite(values).sum(axis=1) < 2, size)
    np.testing.assert_allclose(result.values.numpy(), np.where(few, 0, expected), atol=1e-5)
    assert result.valid.tolist() == np.isfinite(values).ravel().tolist()


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("places", [(3, 4), (2, 3, 4)])
def test_rewards_per_position_are_normalised_position_by_position(places: tuple[int, ...], std: str) -> None:
    """The map in the reward: at each position the scalar rule, as if it were the only one."""
    generator = torch.Generator().manual_seed(0)
    scalar = {name: torch.rand(8, generator=generator) for name in ("a", "b")}
    scalar["b"][3] = torch.nan
    maps = torch.rand(8, *places, generator=generator)
    weights = {"a": 1.0, "b": 0.5}
    result = group_advantages(scalar, weights, _groups(2, 4), std_floor=1e-3, clip=1.2, std=std, credit=maps)
    assert result.values.shape == (8, *places)
    assert result.valid.tolist() == [i != 3 for i in range(8)]
    spreads = []
    for place in itertools.product(*(range(n) for n in places)):
        at = (slice(None), *place)
        alone = group_advantages(
            {name: values * maps[at] for name, values in scalar.items()},
            weights,
            _groups(2, 4),
            std_floor=1e-3,
            clip=1.2,
            std=std,
        )
        torch.testing.assert_close(result.values[at], alone.values)
        spreads.append(alone.group_std)
    torch.testing.assert_close(result.group_std, torch.stack(spreads).mean(dim=0))
    assert float(result.values.max()) == pytest.approx(1.2)
    assert bool((result.values[3] == 0).all())


def test_floor_and_clip_by_hand() -> None:
    rewards = torch.tensor([0.0, 0.0, 0.0, 4.0])
    floored = group_advantages({"r": rewards}, {"r": 1.0}, _groups(1, 4), std_floor=2.0, clip=9)
    np.testing.assert_allclose(floored.values, [-1 / 4] * 3 + [3 / 4], rtol=1e-6)
    clipped = group_advantages({"r": rewards}, {"r": -1.0}, _groups(1, 4), std_floor=2.0, clip=0.5)
    np.testing.assert_allclose(clipped.values, [1 / 4] * 3 + [-1 / 2], rtol=1e-6)


def test_credit_weighs_and_never_flips() -> None:
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -2.0, 0.0])
    spread = allocate_advantages(advantages, maps)
    torch.testing.assert_close(spread, maps * advantages[:, None, None])
    with pytest.raises(ValueError, match="negative"):
        allocate_advantages(advantages, maps - 1)
    with pytest.raises(ValueError, match="expected that of 3 samples"):
        allocate_advantages(advantages, maps[:2])


def test_controls_of_the_map() -> None:
    maps = torch.tensor([[[0.0, 0.25], [0.5, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    constant, groups = torch.tensor([False, True]), torch.tensor([0, 0])
    assert torch.equal(controlled("none", maps, constant, groups), maps)
    inverted = controlled("inverted", maps, constant, groups)
    assert torch.equal(inverted[0], 1 - maps[0])
    assert torch.equal(inverted[1], maps[1])
    mean_one = maps / maps.mean(dim=(1, 2), keepdim=True)
    inverted = controlled("inverted", mean_one, constant, groups, mean_one=True)
    torch.testing.assert_close(inverted.mean(dim=(1, 2)), torch.ones(2))


@pytest.mark.parametrize("places", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("normalize", ["minmax", "mean"])
def test_controls_keep_what_they_claim_to_keep(places: tuple[int, ...], normalize: str) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(6, *places, generator=generator)
    positions = tuple(range(1, maps.ndim))
    low, high = maps.amin(dim=positions, keepdim=True), maps.amax(dim=positions, keepdim=True)
    maps = (maps - low) / (high - low) if normalize == "minmax" else maps / maps.mean(dim=positions, keepdim=True)
    constant, groups = torch.zeros(6, dtype=torch.bool), torch.tensor([0, 1, 0, 1, 1, 0])
    count = maps[0].numel()
    permutations = torch.stack([torch.randperm(count, generator=generator) for _ in range(6)])
    made = {
        kind: controlled(kind, maps, constant, groups, mean_one=normalize == "mean", permutations=permutations)
        for kind in ("none", "mean", "group", "shuffled", "inverted")
    }
    assert all(weights.shape == maps.shape for weights in made.values())
    assert torch.equal(made["none"], maps)
    flat = {kind: weights.flatten(1).double().numpy() for kind, weights in made.items()}
    own = maps.flatten(1).double().numpy()
    # Each sample's own mean, and no layout.
    np.testing.assert_allclose(flat["mean"], np.repeat(own.mean(axis=1, keepdims=True), count, axis=1), rtol=1e-6)
    for row, group in enumerate(groups.tolist()):
        np.testing.assert_allclose(flat["group"][row], own[groups.numpy() == group].mean(axis=0), rtol=1e-5)
    # The same values at other places, each sample by its own permutation.
    np.testing.assert_array_equal(np.sort(flat["shuffled"], axis=1), np.sort(own, axis=1))
    assert all((a != b).any() for a, b in zip(flat["shuffled"], own, strict=True))
    for row, places_of in enumerate(permutations.numpy()):
        np.testing.assert_array_equal(flat["shuffled"][row], own[row][places_of])
    # The order turned round, the normalisation kept.
    for row in range(6):
        assert stats.spearmanr(flat["inverted"][row], own[row]).statistic == pytest.approx(-1)
    if normalize == "minmax":
        np.testing.assert_allclose(flat["inverted"], 1 - own, atol=1e-6)
    else:
        np.testing.assert_allclose(flat["inverted"].mean(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("normalize", ["minmax", "mean"])
def test_a_map_without_structure_stays_ones(normalize: str) -> None:
    maps, groups = torch.ones(2, 2, 3, 4), torch.tensor([0, 0])
    permutations = torch.arange(24).flip(0).expand(2, 24)
    for kind in ("none", "inverted", "mean", "group", "shuffled"):
        constant, mean_one = torch.ones(2, dtype=torch.bool), normalize == "mean"
        found = controlled(kind, maps, constant, groups, mean_one=mean_one, permutations=permutations)
        assert torch.equal(found, maps)


def test_shuffling_exchanges_the_same_positions_at_every_transition() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, groups = torch.rand(2, 5, 3, 4, generator=generator), torch.tensor([0, 0])
    permutations = torch.stack([torch.randperm(12, generator=generator) for _ in range(2)])
    constant = torch.zeros(2, dtype=torch.bool)
    found = controlled("shuffled", weights, constant, groups, permutations=permutations)
    for sample, step in itertools.product(range(2), range(5)):
        expected = weights[sample, step].flatten()[permutations[sample]]
        assert torch.equal(found[sample, step].flatten(), expected)


def test_shuffling_needs_permutations_of_the_positions() -> None:
    maps, groups, constant = torch.ones(2, 3, 4), torch.tensor([0, 0]), torch.zeros(2, dtype=torch.bool)
    for permutations, told in ((None, "None"), (torch.zeros(2, 11, dtype=torch.int64), r"\(2, 11\)")):
        with pytest.raises(ValueError, match=rf"permutations: expected .* of \(2, 3, 4\), got {told}"):
            controlled("shuffled", maps, constant, groups, permutations=permutations)


def test_object_coverage_is_the_share_of_the_cell() -> None:
    """A red square on grey: whole cells 1, a half cell 1/2, the rest 0; the mean is the object's area."""
    image = torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5)
    image[0, :, 16:32, 20:40] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    covered = object_coverage(image, (8, 8))
    expected = torch.zeros(8, 8)
    expected[2:4, 2] = 0.5
    expected[2:4, 3:5] = 1
    torch.testing.assert_close(covered[0], expected, atol=1e-6, rtol=0)
    assert float(covered.mean()) == pytest.approx(16 * 20 / IMAGE_SIZE**2)
    assert float(object_coverage(torch.full_like(image, 0.5), (8, 8)).max()) == 0


def _moved(shape: tuple[int, ...], stds: list[float], seed: int = 0) -> tuple[Tensor, ...]:
    """A transition drawn by the old policy: value, new mean, old mean, std, and the noise and difference."""
    generator = torch.Generator().manual_seed(seed)
    old, noise, change = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    std = torch.tensor(stds, dtype=torch.float64).reshape(-1, *([1] * (len(shape) - 1)))
    change = 0.02 * change
    return old + std * noise, old + change, old, std, noise, change


@pytest.mark.parametrize("channels", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 2, 5, 6)])
def test_guard_leaves_the_noise_times_the_change(shape: tuple[int, ...], channels: str) -> None:
    """GRPO-Guard: what is left of log rho is ``d . eps``, exactly, per position and for the sample."""
    value, new, old, std, noise, change = _moved(shape, [0.05, 0.3, 2.0])
    log_ratio = position_log_prob(value, new, std, channels) - position_log_prob(value, old, std, channels)
    found = normalized_log_ratio(log_ratio, position_kl(new, old, std, channels), std.flatten())
    expected = (change * noise).mean(dim=1) if channels == "mean" else (change * noise).sum(dim=1)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-7)
    # The published form is the sample's: log rho of the mean log-probability, its bias |d|^2 / (2 std^2), times std.
    bias = (change**2 / (2 * std**2)).flatten(1).sum(dim=1) / found[0].numel() / (1 if channels == "sum" else 4)
    published = (log_ratio.flatten(1).mean(dim=1) + bias) * std.flatten()
    torch.testing.assert_close(found.flatten(1).mean(dim=1), published, atol=1e-10, rtol=1e-7)


def test_guard_takes_out_the_bias_and_evens_out_the_steps() -> None:
    shape = (2, 4, 128, 128)
    value, new, old, std, _, _ = _moved(shape, [0.02, 0.5])
    log_ratio = position_log_prob(value, new, std) - position_log_prob(value, old, std)
    found = normalized_log_ratio(log_ratio, position_kl(new, old, std), std.flatten()).flatten(1)
    before = log_ratio.flatten(1)
    error = found.std(dim=1) / 128
    assert bool((found.mean(dim=1).abs() < 4 * error).all())
    # As it was: below 0 by |d|^2 / (2 std^2), and 25 times as wide where the noise is 25 times as small.
    assert float(before.mean(dim=1)[0]) == pytest.approx(-(0.02**2) / (2 * 0.02**2), rel=0.05)
    assert float(before.std(dim=1)[0] / before.std(dim=1)[1]) > 20
    assert float(found.std(dim=1)[0] / found.std(dim=1)[1]) == pytest.approx(1, rel=0.05)


def test_guard_checks_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"kl, std: expected shapes \(2, 3, 4\) and \(2,\) .*, got \(2, 3\) and \(2,\)"
    ):
        normalized_log_ratio(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(2, 1\)"):
        normalized_log_ratio(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 1))


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


def _surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    ratio: str,
    side: str,
    scope: str,
    clip_range: float,
    weights: Tensor | None = None,
) -> GatedLoss:
    """The loss under the gate that a configuration names."""
    gates = {
        "ppo": PpoGateConfig(scope=scope, range=clip_range),
        "symmetric": SymmetricGateConfig(name="symmetric", scope=scope, range=clip_range),
        "none": NoGateConfig(name="none"),
    }
    # Gates of the ratio read neither means nor std.
    unread = torch.empty(0)
    moved = Moved(log_ratio.detach(), advantages, unread, unread, unread)
    return gated_surrogate(log_ratio, advantages, load_gate(gates[side])(moved), ratio=ratio, weights=weights)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("seed", range(4))
def test_gradient_equals_finite_differences(options: dict[str, str], seed: int, weighted: bool) -> None:
    new, old, advantages = _batch(seed, options["ratio"])
    weights = torch.tensor([0.5, 1.0, 3.0, 8.0, 0.0], dtype=torch.float64) if weighted else None
    clip_range = 0.01 if options["scope"] == "position" else 0.004

    def loss(values: Tensor) -> Tensor:
        return _surrogate(values - old, advantages, clip_range=clip_range, weights=weights, **options).loss

    # Beyond the range the loss is flat, inside it is the ratio: differentiable wherever no gate flips.
    assert torch.autograd.gradcheck(loss, new.clone().requires_grad_(), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("ratio", ["sample", "position"])
def test_ppo_side_is_the_published_minimum(ratio: str) -> None:
    new, old, advantages = _batch(3, ratio)
    eps = 0.004
    found = _surrogate(new - old, advantages, ratio=ratio, side="ppo", scope=ratio, clip_range=eps).loss
    rho = (new - old).exp() if ratio == "position" else (new - old).mean(dim=(1, 2)).exp()
    expected = -torch.minimum(rho * advantages, rho.clamp(1 - eps, 1 + eps) * advantages).mean()
    torch.testing.assert_close(found, expected)


def test_the_range_above_is_its_own() -> None:
    """DAPO's clip-higher: the minimum with ``clip(rho, 1 - eps, 1 + eps')``."""
    new, old, advantages = _batch(3, "position")
    unread = torch.empty(0)
    moved = Moved(new - old, advantages, unread, unread, unread)
    rho, found = (new - old).exp(), {}
    for above in (None, 0.02):
        gate = load_gate(PpoGateConfig(scope="position", range=0.004, range_above=above))
        found[above] = gated_surrogate(new - old, advantages, gate(moved), ratio="position")
        bound = rho.clamp(1 - 0.004, 1 + (above or 0.004))
        torch.testing.assert_close(found[above].loss, -torch.minimum(rho * advantages, bound * advantages).mean())
    assert float(found[0.02].clipped.sum()) < float(found[None].clipped.sum())


def test_uniform_and_grpo_give_the_same_gradient_at_ratio_one() -> None:
    new, _, advantages = _batch(0, "sample")
    gradients = []
    for ratio, spread in (("sample", advantages), ("position", advantages[:, None, None].expand(5, 3, 4))):
        values = new.clone().requires_grad_()
        surrogate = _surrogate(values - new, spread, ratio=ratio, side="ppo", scope="sample", clip_range=1e-4)
        gradients.append(torch.autograd.grad(surrogate.loss, values)[0])
        assert float(surrogate.clipped.sum()) == 0
    torch.testing.assert_close(*gradients)


def test_position_clip_drops_what_agrees_with_the_last_step() -> None:
    """docs/method.md, Gate and scope: the one-sided gate keeps the positions that oppose the step already taken."""
    old = torch.zeros(1, 1, 4)
    new = torch.tensor([[[0.1, 0.1, -0.1, -0.1]]])
    advantages = torch.ones(1, 1, 4)
    values = new.clone().requires_grad_()
    result = _surrogate(values - old, advantages, ratio="position", side="ppo", scope="position", clip_range=0.01)
    (gradient,) = torch.autograd.grad(result.loss, values)
    assert (gradient != 0).tolist() == [[[False, False, True, True]]]
    assert result.clipped.tolist() == [0.5]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_surrogate_of_videos_is_an_explicit_loop(options: dict[str, str]) -> None:
    """Loss, gradient and clipped share, position by position in plain Python, with weights on the samples."""
    generator = torch.Generator().manual_seed(5)
    shape, eps = (3, 2, 3, 4), 0.004 if options["scope"] == "sample" else 0.02
    log_ratio = 0.03 * torch.randn(shape, generator=generator, dtype=torch.float64)
    log_ratio[0] += 0.01
    log_ratio[1] -= 0.01
    advantages = torch.randn(shape if options["ratio"] == "position" else 3, generator=generator, dtype=torch.float64)
    weights = [0.5, 2.0, 1.0]
    values = log_ratio.clone().requires_grad_()
    found = _surrogate(
        values, advantages, clip_range=eps, weights=torch.tensor(weights, dtype=torch.float64), **options
    )
    (gradient,) = torch.autograd.grad(found.loss, values)
    losses, expected, shares = [], torch.zeros_like(log_ratio), []
    for b in range(3):
        own = log_ratio[b].flatten().tolist()
        mean = sum(own) / len(own)
        gains, drops = [], []
        for p, value in enumerate(own):
            a = float(advantages[b].flatten()[p] if options["ratio"] == "position" else advantages[b])
            rho = float(np.exp(value if options["ratio"] == "position" else mean))
            gate = float(np.exp(value if options["scope"] == "position" else mean))
            outside = {
                "ppo": (gate > 1 + eps and a > 0) or (gate < 1 - eps and a < 0),
                "symmetric": not 1 - eps <= gate <= 1 + eps,
                "none": False,
            }[options["side"]]
            bound = min(max(gate, 1 - eps), 1 + eps)
            gains.append(weights[b] * a * (bound if outside else rho))
            drops.append(outside)
            # A sample's ratio depends on each position by its share of the mean.
            slope = 0.0 if outside else weights[b] * a * rho
            expected[b].view(-1)[p] = -slope / (3 * len(own))
        losses.append(-sum(gains) / len(gains))
        shares.append(sum(drops) / len(drops))
    assert float(found.loss.detach()) == pytest.approx(sum(losses) / 3)
    torch.testing.assert_close(gradient, expected)
    assert found.clipped.tolist() == pytest.approx(shares)
    assert options["side"] == "none" or any(shares)


def test_surrogate_checks_shapes() -> None:
    new, old, advantages = _batch(0, "position")
    with pytest.raises(ValueError, match=r"advantages: expected shape \(5,\) for ratio 'sample', got \(5, 3, 4\)"):
        _surrogate(new - old, advantages, ratio="sample", side="ppo", scope="sample", clip_range=0.1)
    with pytest.raises(ValueError, match=r"weights: expected shape \(5,\) of the batch, got \(3,\)"):
        _surrogate(
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
    with pytest.raises(ValueError, match=r"rewards\['a'\]: expected shape \(3,\) of groups, got \(3, 2\)"):
        group_advantages({"a": torch.ones(3, 2)}, {"a": 1.0}, torch.zeros(3, dtype=torch.int64), 1e-4, 5)
