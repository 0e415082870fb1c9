"""Contrast of a group: against explicit loops, and what it must keep."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vipo.credit.contrast import group_contrast, normalized

GROUPS = torch.tensor([0, 1, 0, 1, 0])


def _values(shape: tuple[int, ...] = (5, 3, 4, 6)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _by_hand(values: torch.Tensor, sample: int) -> list[list[float]]:
    members = [i for i, group in enumerate(GROUPS.tolist()) if group == GROUPS[sample]]
    _, channels, height, width = values.shape
    result = []
    for y in range(height):
        row = []
        for x in range(width):
            total = 0.0
            for c in range(channels):
                mean = sum(float(values[i, c, y, x]) for i in members) / len(members)
                total += (float(values[sample, c, y, x]) - mean) ** 2
            row.append(math.sqrt(total / channels))
        result.append(row)
    mean = sum(map(sum, result)) / (height * width)
    return [[value / mean for value in row] for row in result]


def test_contrast_is_the_distance_to_the_groups_mean() -> None:
    values = _values()
    found = group_contrast(values, GROUPS)
    for sample in range(5):
        torch.testing.assert_close(found.weights[sample], torch.tensor(_by_hand(values, sample)))
    assert not found.alike.any()


def test_the_groups_map_is_the_root_mean_square_of_its_samples() -> None:
    values = _values()
    found = group_contrast(values, GROUPS, scope="group").weights
    spread = values[GROUPS == 0].double().var(dim=0, correction=0).mean(dim=0).sqrt()
    for sample in (0, 2, 4):
        torch.testing.assert_close(found[sample], (spread / spread.mean()).float())


@given(st.permutations(range(5)), st.sampled_from(["sample", "group"]), st.sampled_from(["mean", "minmax"]))
def test_it_follows_a_permutation(order: list[int], scope: str, normalize: str) -> None:
    values = _values()
    there = group_contrast(values, GROUPS, scope=scope, normalize=normalize).weights
    back = group_contrast(values[order], GROUPS[order], scope=scope, normalize=normalize).weights
    torch.testing.assert_close(back, there[order])


@pytest.mark.parametrize("scope", ["sample", "group"])
@pytest.mark.parametrize("normalize", ["mean", "minmax"])
def test_it_is_zero_where_all_samples_agree(scope: str, normalize: str) -> None:
    values = _values()
    values[:, :, :2] = values[0, :, :2].clone()
    weights = group_contrast(values, GROUPS, scope=scope, normalize=normalize).weights
    # The mean of equal numbers rounds.
    assert float(weights[:, :2].max()) < 1e-12
    assert bool((weights[:, 2:].amax(dim=(1, 2)) > 0.5).all())
    assert bool((weights >= 0).all())


@pytest.mark.parametrize("normalize", ["mean", "minmax"])
def test_a_group_that_agrees_everywhere_pushes_nowhere(normalize: str) -> None:
    values = _values()
    values[GROUPS == 0] = values[0].clone()
    found = group_contrast(values, GROUPS, normalize=normalize)
    assert found.alike.tolist() == [True, False, True, False, True]
    assert found.weights[GROUPS == 0].count_nonzero() == 0
    assert bool(found.weights.isfinite().all())
    # The rounding of another batch layout is no difference.
    noisy = values * (1 + 1e-7 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1)))
    assert group_contrast(noisy, GROUPS, normalize=normalize).alike.tolist() == [True, False, True, False, True]


def test_a_sample_that_is_not_finite_spoils_no_sibling() -> None:
    values = _values()
    values[2, 0, 0, 0] = math.nan
    found = group_contrast(values, GROUPS)
    assert found.alike.tolist() == [False, False, True, False, False]
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(found.weights[kept], group_contrast(values[kept], GROUPS[kept]).weights)


@pytest.mark.parametrize("scope", ["sample", "group"])
def test_a_part_of_the_samples_is_compared_with_all(scope: str) -> None:
    values, own = _values(), [3, 4]
    whole = group_contrast(values, GROUPS, scope=scope).weights
    part = group_contrast(values[own], GROUPS[own], scope=scope, among=(values, GROUPS)).weights
    assert torch.equal(part, whole[own])


def test_normalisations() -> None:
    values = _values((5, 3, 2, 4, 6))
    mean = group_contrast(values, GROUPS).weights
    torch.testing.assert_close(mean.mean(dim=(1, 2, 3)), torch.ones(5))
    ends = group_contrast(values, GROUPS, normalize="minmax").weights
    assert ends.amin(dim=(1, 2, 3)).tolist() == [0.0] * 5
    assert ends.amax(dim=(1, 2, 3)).tolist() == [1.0] * 5
    flat = torch.full((1, 2, 2), 3.0)
    assert bool((normalized(flat, "minmax") == 1).all())
    assert bool((normalized(flat, "mean") == 1).all())
    squared = group_contrast(values, GROUPS, exponent=2.0).weights
    torch.testing.assert_close(squared, (mean**2) / (mean**2).mean(dim=(1, 2, 3), keepdim=True))


def test_features_come_onto_the_latents_grid() -> None:
    """A backbone's features, twice as coarse: an object in one corner is a contrast in that corner."""
    features = torch.zeros(4, 8, 3, 3)
    features[0, :, 0, 0], features[1, :, 0, 0] = 1.0, -1.0
    weights = group_contrast(features, torch.zeros(4, dtype=torch.int64), size=(6, 6)).weights
    assert weights.shape == (4, 6, 6)
    assert float(weights[0, 0, 0]) == float(weights[0].max())
    assert float(weights[0, 5, 5]) == 0.0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="expected"):
        group_contrast(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="not one of"):
        group_contrast(_values(), GROUPS, normalize="softmax")
    with pytest.raises(ValueError, match="above 0"):
        group_contrast(_values(), GROUPS, exponent=0.0)
