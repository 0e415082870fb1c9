"""Clips: frame groups, directions followed through a clip, and the path that an accelerator takes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vipo.config.perception import PerceptionConfig
from vipo.generators.frames import causal_frame_groups
from vipo.perception import Backbone, PerceptualStructuring, consecutive_correlation
from vipo.perception.temporal import average_groups, follow_components, smooth_in_time
from vipo.sampling.noise import keyed_generator


class Patches(torch.nn.Module):
    """A fixed random projection of patches of 4x4 pixels."""

    def __init__(self, width):
        super().__init__()
        # A buffer: a module of fake parameters cannot be moved.
        self.register_buffer("weight", torch.randn(width, 3, 4, 4, generator=keyed_generator("patches", width)))

    def forward(self, images):
        return torch.tanh(F.conv2d(images, self.weight, stride=4))


RULES = ("norm", "centre", "border", "skew", "inverted_sklearn", "none")


def module(width=12, input_size=48, **options):
    options = {"components": 3, "orientation": "border"} | options
    backbone = Backbone(Patches(width), feature_width=width, orientation="border", input_size=input_size, stride=4)
    return PerceptualStructuring(backbone, PerceptionConfig(**options))


def moving_object(frames=13, size=48):
    """A textured disc that crosses a textured ground whose light pulsates."""
    generator = keyed_generator("clip")
    ground, skin = (
        F.interpolate(torch.rand(1, 3, 12, 12, generator=generator), size=(size, size), mode="bilinear")[0]
        for _ in range(2)
    )
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pictures = []
    for frame in range(frames):
        centre = 10 + (size - 20) * frame / (frames - 1)
        inside = ((x - centre) ** 2 + (y - size / 2) ** 2 < 80).float()
        light = 0.5 + 0.5 * torch.sin(torch.tensor(2.1 * frame)) * (x / size)
        pictures.append((inside * skin + (1 - inside) * 0.6 * ground * light).clamp(0, 1))
    return torch.stack(pictures)[None]


@given(st.integers(0, 30), st.integers(1, 8))
def test_causal_groups_cover_every_frame_once(latent, factor):
    groups = causal_frame_groups(1 + latent * factor, factor)
    assert [frame for group in groups for frame in group] == list(range(1 + latent * factor))
    assert [len(group) for group in groups] == [1] + [factor] * latent


def test_wan_groups():
    assert causal_frame_groups(9) == (range(0, 1), range(1, 5), range(5, 9))
    for frames, factor in ((8, 4), (0, 4), (5, 0)):
        with pytest.raises(ValueError, match="frames: "):
            causal_frame_groups(frames, factor)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_flips_and_swaps_are_undone(count, key):
    generator = keyed_generator("follow", key)
    basis = torch.linalg.qr(torch.randn(12, count, generator=generator, dtype=torch.float64))[0].T
    frames = [basis]
    for _ in range(5):
        order = torch.randperm(count, generator=generator)
        sign = torch.randint(0, 2, (count, 1), generator=generator) * 2.0 - 1
        turned = basis + 0.05 * torch.randn(count, 12, generator=generator, dtype=torch.float64)
        frames.append(F.normalize(turned, dim=1)[order] * sign)
    # A frame without structure in between says nothing.
    frames.insert(3, torch.randn(count, 12, generator=generator, dtype=torch.float64))
    directions = torch.stack(frames)[None]
    structured = torch.tensor([[True, True, True, False, True, True, True]])
    aligned = follow_components(directions, structured) @ directions
    kept = aligned[:, structured[0]]
    assert ((kept * basis).sum(dim=-1) > 0.5).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 10**6))
def test_smoothing_in_time_equals_scipy(frames, sigma, key):
    maps = torch.rand(2, frames, 3, 4, generator=keyed_generator("time", key), dtype=torch.float64)
    expected = gaussian_filter1d(maps.numpy(), sigma, axis=1) if sigma else maps.numpy()
    assert smooth_in_time(maps, sigma).numpy() == pytest.approx(expected, abs=1e-12)


def test_groups_are_means_and_must_fit():
    maps = torch.arange(5.0).view(1, 5, 1, 1)
    assert average_groups(maps, causal_frame_groups(5)).flatten().tolist() == [0.0, 2.5]
    for groups in ([range(4, 6)], [range(2, 2)], []):
        with pytest.raises(ValueError, match="frame_groups: "):
            average_groups(maps, groups)


@pytest.mark.parametrize("rule", RULES)
def test_the_maps_of_a_clip_do_not_flip(rule):
    clip = moving_object()
    each = tuple(range(frame, frame + 1) for frame in range(clip.shape[1]))
    structuring = module(orientation=rule, temporal_smoothing=0.0)
    followed = consecutive_correlation(structuring(clip, (12, 12), each).maps)
    assert float(followed.min()) > 0.5, followed


def test_a_sign_per_frame_flips():
    clip = moving_object()
    apart = module(orientation="none")(clip[0], (12, 12)).maps
    assert float(consecutive_correlation(apart[None]).min()) < 0


def test_a_still_clip_has_the_map_of_its_picture():
    picture = moving_object()[:, 4]
    structuring = module(temporal_smoothing=0.3)
    clip = picture[:, None].expand(-1, 9, -1, -1, -1)
    found = structuring(clip, (6, 8), causal_frame_groups(9))
    assert found.maps.shape == (1, 3, 6, 8)
    assert torch.allclose(found.maps, structuring(picture, (6, 8)).maps[:, None].expand(-1, 3, -1, -1), atol=1e-5)


def test_clips_do_not_depend_on_the_batch_or_its_chunks():
    clips = torch.cat([moving_object(), moving_object().flip(1), moving_object().flip(4)])
    structuring, groups = module(), causal_frame_groups(13)
    together = structuring(clips, (8, 8), groups).maps
    alone = torch.cat([structuring(clip[None], (8, 8), groups).maps for clip in clips])
    assert torch.allclose(together, alone, atol=1e-5)
    assert float(together.amin()) == 0
    assert torch.all(together.amax(dim=(1, 2, 3)) == 1)
    mean = module(normalize="mean")(clips, (8, 8), groups).maps
    assert torch.allclose(mean.mean(dim=(1, 2, 3)), torch.ones(3), atol=1e-5)


def test_constant_clips_are_told_and_an_empty_frame_is_not_one():
    clips = torch.cat([moving_object(), torch.full_like(moving_object(), 0.5), moving_object(), moving_object()])
    clips[2, 1:5] = 0.5
    clips[3, 7, 0, 0, 0] = float("nan")
    found = module(temporal_smoothing=0.0)(clips, (8, 8), causal_frame_groups(13))
    assert found.constant.tolist() == [False, True, False, True]
    assert torch.equal(found.maps[[1, 3]], torch.ones(2, 4, 8, 8))
    found.check()


def test_a_frame_without_structure_takes_the_mean_of_the_others():
    clip = moving_object(frames=5)
    clip[0, [1, 4]] = torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
    each = tuple(range(frame, frame + 1) for frame in range(5))
    found = module(temporal_smoothing=0.0)(clip, (8, 8), each)
    assert found.constant.tolist() == [False]
    # The clip's min-max acts on every frame alike, so that the mean stays the mean.
    assert torch.allclose(found.maps[0, 1], found.maps[0, [0, 2, 3]].mean(dim=0), atol=1e-6)
    assert torch.equal(found.maps[0, 4], found.maps[0, 1])
    assert torch.all(found.maps[0, [0, 2, 3]].amax(dim=(1, 2)) > found.maps[0, 1].amax())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.fixed_dictionaries(
        {
            "components": st.integers(1, 8),
            "input_size": st.sampled_from([12, 20, 24]),
            "orientation": st.sampled_from(RULES),
            "aggregation": st.sampled_from(["variance", "average", "first"]),
            "smoothing": st.sampled_from([0.0, 1.0]),
            "temporal_smoothing": st.sampled_from([0.0, 0.3, 2.0]),
        }
    ),
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.randoms(),
)
def test_clips_of_any_shape(batch, latent, options, size, random):
    frames, order = 1 + 4 * latent, random.sample(range(batch + 1), batch + 1)
    generator = keyed_generator("clips", random.randrange(10**6))
    clips = torch.rand(batch + 1, frames, 3, random.randint(9, 40), random.randint(9, 40), generator=generator)
    clips[:batch, random.randrange(frames)] = 0.0
    clips[batch] = 0.4
    structuring, groups = module(**options), causal_frame_groups(frames)
    found = structuring(clips, size, groups)
    found.check()
    assert found.maps.shape == (batch + 1, len(groups), *size)
    empty = [frames == 1] * batch + [True]
    assert found.constant.tolist() == empty
    assert torch.equal(found.maps[found.constant], torch.ones(sum(empty), len(groups), *size))
    structured = found.maps[~found.constant]
    assert torch.all(structured.amin(dim=(1, 2, 3)) == 0)
    assert torch.all(structured.amax(dim=(1, 2, 3)) == 1)
    permuted = structuring(clips[order], size, groups)
    assert torch.allclose(permuted.maps, found.maps[order], atol=1e-5)
    assert torch.equal(permuted.constant, found.constant[order])


def test_wrong_clips_are_named():
    with pytest.raises(ValueError, match=r"images: expected clips of shape \(B, T, 3, H, W\)"):
        module()(torch.rand(5, 3, 48, 48), (8, 8), causal_frame_groups(5))


@pytest.mark.parametrize("rule", ["norm", "centre", "border", "skew", "inverted_sklearn"])
@pytest.mark.parametrize("frames", [0, 5])
def test_nothing_waits_for_the_accelerator(rule, frames):
    # Fake tensors hold no values: a branch on one, .item() or nonzero raises. What else makes the host wait (an
    # eigendecomposition that reads its error code, a copy between devices) is looked for among the operations.
    with FakeTensorMode():
        structuring = module(width=40, orientation=rule, normalize="mean", components=3)
        structuring.backbone.to("cuda")
        images = torch.rand(2, *([frames] if frames else []), 3, 48, 48, device="cuda")
        groups = causal_frame_groups(frames) if frames else None

        def maps(pictures):
            found = structuring(pictures, (8, 8), groups)
            return found.maps, found.constant, found.finite, found.converged

        graph = make_fx(maps)(images).graph
        assert all(value.device.type == "cuda" for value in maps(images))
        with pytest.raises(DataDependentOutputException):
            structuring(images, (8, 8), groups).check()
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert any("linalg_cholesky_ex" in name for name in names)
    waits = ("linalg_eig", "linalg_svd", "linalg_qr", "lu_factor", "nonzero", "local_scalar", "masked_select")
    assert not [name for name in names if any(word in name for word in waits)]
    made = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(made) > 100
    assert {value.device.type for value in made} == {"cuda"}
