"""The allocator against scikit-learn, SciPy and closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from vipo.errors import VipoError
from vipo.maps.scoring import area_under_curve
from vipo.perception.allocator import allocate, smooth
from vipo.perception.components import _jacobi, _subspace_iteration, principal_components
from vipo.perception.orientation import is_blind, orient, orientation_scores
from vipo.sampling.noise import keyed_generator

RULES = ("norm", "centre", "border", "skew")
ALL_RULES = (*RULES, "inverted_sklearn", "none")
PAPER = {"components": 3, "aggregation": "variance", "smoothing": 1.0, "orientation": "border", "normalize": "minmax"}


def features(batch, width, height, breadth, *, decay=0.5, key=0):
    """Smooth random features with a decaying spectrum and a mean away from 0."""
    noise = torch.randn(batch, width, height, breadth, generator=keyed_generator("test", key), dtype=torch.float64)
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -decay
    return (noise * scale.view(1, -1, 1, 1) + 2.0).float()


def independent_sign(z, cells, rule):
    """Each rule written again, position by position, for one component ``(h, w)``."""
    height, width = z.shape
    inside = [(i, j) for i in range(1, height - 1) for j in range(1, width - 1)]
    if rule == "skew":
        return 1 if np.mean((z - z.mean()) ** 3) >= 0 else -1
    if rule == "border":
        ring = [z[i, j] for i in range(height) for j in range(width) if (i, j) not in inside]
        return 1 if np.mean([z[p] for p in inside]) >= np.mean(ring) else -1
    cue = np.zeros_like(z)
    for i in range(height):
        for j in range(width):
            dy, dx = (i - (height - 1) / 2) / height, (j - (width - 1) / 2) / width
            cue[i, j] = np.sqrt((cells[:, i, j] ** 2).sum()) if rule == "norm" else -(dy**2 + dx**2)
    return 1 if np.corrcoef(z.ravel(), cue.ravel())[0, 1] >= 0 else -1


def reference_map(cells, size, *, components, aggregation, smoothing, orientation, normalize):
    """One image ``(d, h, w)``: scikit-learn's full PCA, SciPy's smoothing, torch's antialiased resize."""
    width, height, breadth = cells.shape
    pca = PCA(n_components=components, svd_solver="full")
    scores = pca.fit_transform(cells.reshape(width, -1).T.astype(np.float64)).T.reshape(components, height, breadth)
    oriented = [z if orientation == "none" else z * independent_sign(z, cells, orientation) for z in scores]
    scaled = [(z - z.min()) / (z.max() - z.min()) for z in oriented]
    if aggregation == "average":
        # Of the raw projections: docs/method.md, `average`.
        heat = np.mean(oriented, axis=0)
        heat = (heat - heat.min()) / (heat.max() - heat.min())
    else:
        weights = pca.explained_variance_ratio_ if aggregation == "variance" else np.eye(components)[0]
        heat = sum(w * z for w, z in zip(weights, scaled, strict=True))
    if smoothing:
        heat = gaussian_filter(heat, smoothing)
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    heat = F.interpolate(torch.from_numpy(heat)[None, None], size=size, mode="bilinear", antialias=True)[0, 0].numpy()
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    return heat / heat.mean() if normalize == "mean" else heat


@pytest.mark.parametrize("shape", [(40, 12, 12), (24, 9, 14), (90, 5, 7), (620, 26, 27)])
@pytest.mark.parametrize("rule", [*RULES, "none"])
def test_maps_equal_the_independent_reference(shape, rule):
    cells = features(2, *shape, key=1)
    options = PAPER | {"orientation": rule}
    for size in ((16, 16), (10, 24)):
        found = allocate(cells, size, **options)
        expected = [reference_map(one, size, **options) for one in cells.numpy()]
        assert np.abs(found.maps.numpy() - np.stack(expected)).max() < 1e-4
        assert not found.constant.any()


@pytest.mark.parametrize("aggregation", ["variance", "average", "first"])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("normalize", ["minmax", "mean"])
@pytest.mark.parametrize("components", [1, 5])
def test_every_option_equals_the_independent_reference(aggregation, smoothing, normalize, components):
    options = {
        "components": components,
        "aggregation": aggregation,
        "smoothing": smoothing,
        "orientation": "norm",
        "normalize": normalize,
    }
    cells = features(1, 30, 8, 11, key=2)
    expected = reference_map(cells[0].numpy(), (12, 20), **options)
    assert np.abs(allocate(cells, (12, 20), **options).maps[0].numpy() - expected).max() < 1e-4


def published_average(cells, size):
    """What both public functions do for one picture, from the equations alone: no PCA class, inverted sign, no blur."""
    width, height, breadth = cells.shape
    rows = cells.reshape(width, -1).T.astype(np.float64)
    rows = rows - rows.mean(axis=0)
    # scikit-learn's sign: each direction's loading of largest magnitude is positive.
    _, _, directions = np.linalg.svd(rows, full_matrices=False)
    directions = [d * np.sign(d[np.abs(d).argmax()]) for d in directions[:3]]
    mean = np.mean([rows @ d for d in directions], axis=0).reshape(height, breadth)
    important = 1 - (mean - mean.min()) / (mean.max() - mean.min())
    heat = F.interpolate(torch.from_numpy(important)[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
    return ((heat - heat.min()) / (heat.max() - heat.min())).numpy()


def test_average_is_the_published_ablation_and_not_the_mean_of_scaled_projections():
    cells, size = features(1, 30, 8, 11, key=4), (12, 20)
    options = PAPER | {"aggregation": "average", "smoothing": 0.0, "orientation": "inverted_sklearn"}
    found = allocate(cells, size, **options).maps[0].numpy()
    assert np.abs(found - published_average(cells[0].numpy(), size)).max() < 1e-6
    projections = principal_components(cells, 3).projections[0].numpy()
    scaled = [1 - (z - z.min()) / (z.max() - z.min()) for z in projections]
    former = F.interpolate(torch.from_numpy(np.mean(scaled, axis=0))[None, None], size=size, mode="bilinear")[0, 0]
    former = (former - former.min()) / (former.max() - former.min())
    assert np.abs(found - former.numpy()).max() > 0.05


@pytest.mark.parametrize(
    ("shape", "decay"),
    [((40, 16, 16), 0.5), ((300, 6, 9), 0.5), ((600, 25, 26), 0.5), ((700, 23, 24), 1.0), ((530, 23, 24), 0.0)],
    ids=["tall", "wide", "krylov", "krylov-wide", "no-decay"],
)
def test_components_equal_full_pca(shape, decay):
    cells = features(1, *shape, decay=decay, key=3)
    found = principal_components(cells, 3)
    projections, explained = found.projections, found.explained
    rows = cells[0].flatten(1).T.double().numpy()
    pca = PCA(n_components=3, svd_solver="full").fit(rows)
    expected = pca.transform(rows).T
    scale = np.abs(expected).max()
    # scikit-learn's sign rule is ours for "none".
    assert np.abs(projections[0].flatten(1).numpy() - expected).max() / scale < 1e-5
    assert np.abs(explained[0].numpy() - pca.explained_variance_ratio_).max() < 1e-7
    assert np.abs(found.directions[0].numpy() - pca.components_).max() < 1e-5
    assert found.converged.all()


def test_images_that_converge_slowly_do_not_disturb_the_others():
    smooth_image, flat_image = features(1, 600, 25, 26, key=4), features(1, 600, 25, 26, decay=0.0, key=5)
    together = principal_components(torch.cat([smooth_image, flat_image]), 2).projections
    for one, alone in zip(together, (smooth_image, flat_image), strict=True):
        assert (one - principal_components(alone, 2).projections[0]).abs().max() < 1e-7 * one.abs().max()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 17), st.integers(0, 10**6))
def test_jacobi_equals_lapack(size, key):
    root = torch.randn(3, size, size, generator=keyed_generator("jacobi", key), dtype=torch.float64)
    matrix = root @ root.mT * 10.0 ** (key % 7 - 3)
    values, vectors = _jacobi(matrix)
    scale = float(matrix.abs().amax())
    assert torch.allclose(values, torch.linalg.eigvalsh(matrix).flip(1), rtol=0, atol=1e-12 * scale)
    assert torch.allclose(matrix @ vectors, vectors * values[:, None], rtol=0, atol=1e-11 * scale)
    assert torch.allclose(vectors.mT @ vectors, torch.eye(size, dtype=torch.float64).expand_as(matrix), atol=1e-12)


@pytest.mark.parametrize(("size", "rank"), [(2, 2), (40, 40), (200, 200), (200, 2), (300, 0)])
def test_the_iteration_of_accelerators_equals_lapack(size, rank):
    cells = torch.randn(2, 2 * size, size, generator=keyed_generator("iteration", size), dtype=torch.float64)
    cells = cells * torch.where(torch.arange(size) < rank, torch.arange(1.0, size + 1) ** -0.5, 0.0)
    gram = cells.mT @ cells
    values, vectors = _subspace_iteration(gram, 2)
    assert torch.allclose(values, torch.linalg.eigvalsh(gram)[:, -2:].flip(1), rtol=1e-10, atol=1e-10)
    assert (gram @ vectors - vectors * values[:, None]).norm(dim=1).amax() <= 1e-8 * float(values.amax())


def test_what_the_iteration_cannot_reach_is_seen_by_its_residual(monkeypatch):
    # A spectrum without decay; as on an accelerator, where the exact solution is not fallen back to.
    monkeypatch.setattr("vipo.perception.components._exact", lambda gram, count: (_ for _ in ()).throw(AssertionError))
    with pytest.raises(AssertionError):
        principal_components(features(1, 530, 23, 24, decay=0.0, key=3), 3)
    assert principal_components(features(1, 530, 23, 24, decay=1.0, key=3), 3).converged.all()


def test_no_global_generator_is_read():
    cells = features(1, 600, 25, 26, key=6)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(allocate(cells, (8, 8), **PAPER).maps)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*results)


def test_rank_below_k_leaves_the_missing_components_out():
    ramp = torch.linspace(0, 1, 8).expand(1, 6, 5, 8) * torch.arange(1, 7).view(1, 6, 1, 1)
    found = principal_components(ramp, 3)
    projections, explained = found.projections, found.explained
    assert explained[0].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert projections[0, 1:].abs().max() == 0
    found = allocate(ramp, (5, 8), **PAPER | {"aggregation": "average", "smoothing": 0.0, "orientation": "norm"})
    assert torch.allclose(found.maps[0], torch.linspace(0, 1, 8).expand(5, 8), atol=1e-6)


@st.composite
def batches(draw, rules=ALL_RULES):
    """Features of any batch, width and grid, a rule that is not blind there, and as many components as they have."""
    width, height, breadth = draw(st.integers(1, 24)), draw(st.integers(1, 9)), draw(st.integers(2, 9))
    rule = draw(st.sampled_from(rules))
    assume(not is_blind(rule, height, breadth))
    # Two positions are each other's mirror image: no third moment.
    assume(height * breadth > 2 or rule != "skew")
    cells = features(draw(st.integers(1, 5)), width, height, breadth, key=draw(st.integers(0, 10**6)))
    return cells, rule, draw(st.integers(1, min(8, width, height * breadth - 1)))


options = st.fixed_dictionaries(
    {
        "aggregation": st.sampled_from(["variance", "average", "first"]),
        "smoothing": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "normalize": st.sampled_from(["minmax", "mean"]),
    }
)
sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(batches(), options, sizes, st.randoms())
def test_ranges_means_and_permutations(batch, chosen, size, random):
    cells, rule, components = batch
    chosen = {"orientation": rule, "components": components} | chosen
    found = allocate(cells, size, **chosen)
    assert found.maps.shape == (len(cells), *size)
    assert found.maps.dtype == torch.float32
    if chosen["normalize"] == "minmax":
        assert torch.all(found.maps.amin(dim=(1, 2))[~found.constant] == 0)
        assert torch.all(found.maps.amax(dim=(1, 2)) == 1)
    else:
        assert found.maps.amin() >= 0
        assert torch.allclose(found.maps.mean(dim=(1, 2)), torch.ones(len(cells)), atol=1e-5)
    order = torch.tensor(random.sample(range(len(cells)), len(cells)))
    permuted = allocate(cells[order], size, **chosen)
    assert torch.allclose(permuted.maps, found.maps[order], atol=1e-6)
    assert torch.equal(permuted.constant, found.constant[order])


@settings(max_examples=40, deadline=None)
@given(batches(), options, st.floats(0.1, 5), st.floats(0, 0.99))
def test_exponent_and_floor_act_on_the_map_before_its_mean(batch, chosen, exponent, floor):
    cells, rule, components = batch
    chosen = {"orientation": rule, "components": components} | chosen
    plain = allocate(cells, (6, 7), **chosen | {"normalize": "minmax"})
    found = allocate(cells, (6, 7), **chosen, exponent=exponent, floor=floor)
    expected = floor + (1 - floor) * plain.maps.double() ** exponent
    if chosen["normalize"] == "mean":
        expected = expected / expected.mean(dim=(1, 2), keepdim=True)
    expected = torch.where(plain.constant[:, None, None], 1.0, expected)
    assert torch.allclose(found.maps.double(), expected, atol=1e-4)
    assert found.maps.amin() >= 0


def test_the_inverted_sign_is_one_minus_the_min_max():
    cells = features(2, 12, 6, 7, key=9)
    plain = PAPER | {"aggregation": "first", "smoothing": 0.0}
    ours = allocate(cells, (6, 7), **plain | {"orientation": "inverted_sklearn"}).maps
    sklearns = allocate(cells, (6, 7), **plain | {"orientation": "none"}).maps
    assert torch.allclose(ours, 1 - sklearns, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(batches(RULES), st.randoms())
def test_orientation_ignores_the_sign_it_is_given(batch, random):
    cells, rule, components = batch
    projections = principal_components(cells, components).projections
    flipped = projections * torch.tensor([random.choice([-1.0, 1.0]) for _ in range(components)]).view(1, -1, 1, 1)
    assert torch.equal(orient(projections, cells, rule), orient(flipped, cells, rule))
    assert torch.equal(orient(flipped, cells, "none"), flipped)


@pytest.mark.parametrize(
    ("rule", "grid"),
    [("border", (2, 2)), ("border", (2, 9)), ("border", (9, 1)), ("centre", (2, 2)), ("centre", (1, 2))],
)
def test_a_rule_that_is_blind_on_a_grid_is_refused(rule, grid):
    cells = features(1, 4, *grid, key=7)
    with pytest.raises(
        ValueError, match=rf"orientation: '{rule}' .* {grid[0]}x{grid[1]} grid; raise input_size, or .* layer"
    ):
        allocate(cells, (6, 6), **PAPER | {"components": 1, "orientation": rule})


@pytest.mark.parametrize(("rule", "grid"), [("border", (3, 3)), ("centre", (2, 3)), ("centre", (3, 1))])
def test_the_smallest_grids_of_a_rule_decide(rule, grid):
    projections = features(1, 4, *grid, key=8)
    assert orientation_scores(projections - projections.mean(dim=(2, 3), keepdim=True), projections, rule).all()


def test_orientation_rules_on_a_known_picture():
    # A bright off-centre blob: every rule must put it above the ground, whichever sign comes in.
    heat = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    heat[..., 2:5, 3:6] = 1.0
    cells = 1 + heat * torch.ones(1, 4, 1, 1)
    centred = heat - heat.mean()
    for rule in RULES:
        for sign in (1.0, -1.0):
            assert torch.equal(orient(sign * centred, cells, rule), centred), rule


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.3, 0.5, 1.0, 2.0, 7.5]))
def test_smoothing_equals_scipy(height, width, sigma):
    grid = torch.rand(height, width, generator=keyed_generator("smooth", height, width), dtype=torch.float64)
    expected = gaussian_filter(grid.numpy(), sigma, mode="reflect", truncate=4.0)
    assert np.abs(smooth(grid[None], sigma)[0].numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("normalize", ["minmax", "mean"])
def test_constant_features_give_ones_and_are_told(normalize):
    rounding = 1e-7 * torch.randn(1, 5, 6, 6, generator=keyed_generator("rounding"))
    cells = torch.cat([torch.zeros(1, 5, 6, 6), torch.full((1, 5, 6, 6), 3.0) + rounding, features(1, 5, 6, 6)])
    found = allocate(cells, (4, 7), **PAPER | {"normalize": normalize})
    assert found.constant.tolist() == [True, True, False]
    assert torch.equal(found.maps[:2], torch.ones(2, 4, 7))
    assert float(found.maps[2].std()) > 0.01


def test_a_map_that_is_flat_on_the_latent_grid_is_constant():
    found = allocate(features(1, 5, 6, 6), (1, 1), **PAPER)
    assert found.constant.tolist() == [True]
    assert found.maps.tolist() == [[[1.0]]]


def test_maps_carry_no_gradient():
    cells = features(1, 5, 6, 6).requires_grad_()
    assert not allocate(cells, (6, 6), **PAPER).maps.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"components": 6}, r"components: 6 is outside 1\.\.5 for features of width 5"),
        ({"components": 0}, "components: 0"),
        ({"aggregation": "sum"}, "aggregation: 'sum'"),
        ({"orientation": "left"}, "orientation: 'left'"),
        ({"normalize": "max"}, "normalize: 'max'"),
        ({"smoothing": float("nan")}, "smoothing: nan"),
        ({"smoothing": -1.0}, "smoothing: -1"),
        ({"exponent": 0.0}, "exponent: 0"),
        ({"floor": 1.0}, "floor: 1"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        allocate(features(1, 5, 6, 6), (6, 6), **PAPER | change)


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"features: expected shape \(B, d, h, w\).*\(5, 6, 6\)"):
        allocate(torch.zeros(5, 6, 6), (6, 6), **PAPER)
    broken = features(3, 5, 6, 6)
    broken[1, 0, 0, 0] = float("nan")
    found = allocate(broken, (6, 6), **PAPER)
    assert found.finite.tolist() == [True, False, True]
    assert found.maps[1].isnan().all()
    assert torch.equal(found.maps[::2], allocate(features(3, 5, 6, 6), (6, 6), **PAPER).maps[::2])
    with pytest.raises(VipoError, match=r"non-finite in sample\(s\) \[1\]"):
        found.check()
    with pytest.raises(ValueError, match="projections: shape"):
        orient(torch.zeros(1, 2, 3, 4), torch.zeros(1, 5, 3, 3), "norm")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
def test_area_under_curve_equals_scikit_learn(rows):
    scores, labels = torch.tensor([row[0] for row in rows]).double(), torch.tensor([row[1] for row in rows])
    if labels.all() or not labels.any():
        with pytest.raises(ValueError, match="labels"):
            area_under_curve(scores, labels)
    else:
        assert area_under_curve(scores, labels) == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()))
