"""Rewards: closed forms, the registry, and what a bad reward leads to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from torch import Tensor, nn

from vipo.config.registries import CLIP_REWARDS
from vipo.config.reward_options import REWARD_OPTIONS
from vipo.demo.scenes import (
    BACKGROUNDS,
    COLORS,
    CaptionParts,
    Scene,
    SceneObject,
    draw,
    object_mask,
    sample_scene,
    scene_metadata,
)
from vipo.rewards import REWARDS, Reward, RewardError, Scored, load_reward, score, score_where
from vipo.rewards.registry import find_reward
from vipo.rewards.resident import Resident, by_network, in_use

# Those that need no weights, of pictures.
RULES = [name for name in REWARDS if name not in (*REWARD_OPTIONS, *CLIP_REWARDS)]


def _score(name: str, images: Tensor, metadata: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
    batch = len(images)
    return score(name, load_reward(name), images, ["a prompt"] * batch, metadata or [{}] * batch)


def _scene(shape: str = "square", color: str = "red", background: str = "gray", x: float = 0.0) -> Scene:
    return Scene((SceneObject(shape, color, "small", "in the middle", x, 0.0, 10.0),), background)


def _pictures(*scenes: Scene) -> Tensor:
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes]))


def _redness(color: tuple[float, float, float]) -> float:
    return color[0] - (color[1] + color[2]) / 2


@given(st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), min_size=1, max_size=4))
def test_redness_of_flat_colours_is_the_formula(colors: list[tuple[float, float, float]]) -> None:
    images = torch.tensor(colors)[:, :, None, None].expand(-1, 3, 6, 5)
    assert _score("redness", images).tolist() == pytest.approx([_redness(color) for color in colors], abs=1e-6)


def test_redness_is_the_mean_over_each_picture_alone() -> None:
    images = torch.rand(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    array = images.numpy().astype(np.float64)
    expected = (array[:, 0] - (array[:, 1] + array[:, 2]) / 2).mean(axis=(1, 2))
    assert _score("redness", images).numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_object_redness_is_the_object_s_own(color: str, background: str) -> None:
    # Antialiased edges count as object where they are far from the background, hence the tolerance.
    value = _score("object_redness", _pictures(_scene("square", color, background))).item()
    assert value == pytest.approx(_redness(COLORS[color]), abs=0.06)


def test_object_redness_is_continuous_local_and_ignores_position() -> None:
    picture = _pictures(_scene())
    inside = torch.from_numpy(object_mask(_scene().objects[0]) > 0.99)
    redder = picture + 0.02 * inside * torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    both = _score("object_redness", torch.cat([picture, redder]))
    share = inside.sum() / ((picture - picture[..., :1, :1]).norm(dim=1) > 0.25).sum()
    assert (both[1] - both[0]).item() == pytest.approx(0.02 * share.item(), abs=1e-5)
    moved = _score("object_redness", _pictures(_scene(x=-15.0), _scene(x=15.0)))
    assert moved[0].item() == pytest.approx(moved[1].item(), abs=1e-6)


def test_object_redness_of_no_object_is_the_lowest() -> None:
    empty = _pictures(Scene((), "gray"))
    speckled = empty.clone()
    speckled[..., 30:34, 30:34] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    cyan = empty.clone()
    cyan[..., 20:40, 20:40] = torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    assert _score("object_redness", torch.cat([empty, speckled, cyan])).tolist() == pytest.approx([-1.0] * 3)


def test_scene_rewards_on_drawings_are_full_marks() -> None:
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng) for _ in range(60)]
    metadata = [scene_metadata(scene, CaptionParts()) for scene in scenes]
    for name in ("scene", "scene_shape", "scene_background", "scene_count"):
        assert _score(name, _pictures(*scenes), metadata).mean() >= 0.99


def test_scene_rewards_count_the_claims_that_hold() -> None:
    claim = scene_metadata(_scene("square", "red", "gray"), CaptionParts(size=False, position=False))
    pictures = _pictures(
        _scene(),
        _scene(shape="circle"),
        _scene(background="mint"),
        Scene((), "gray"),
        Scene((), "mint"),
    )
    metadata = [claim] * 5  # background, count, shape, color
    assert _score("scene", pictures, metadata).tolist() == [1.0, 0.75, 0.75, 0.25, 0.0]
    assert _score("scene_shape", pictures, metadata).tolist() == [1, 0, 1, 0, 0]
    assert _score("scene_background", pictures, metadata).tolist() == [1, 1, 0, 1, 0]
    assert _score("scene_count", pictures, metadata).tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "claim",
    [
        {},
        {"objects": [{"shape": "circle"}]},
        {"background": "white", "objects": []},
        {"background": "white", "objects": "[{'shape': 'circle'}]"},
        {"background": "white", "objects": [{"color": "red"}]},
    ],
)
@pytest.mark.parametrize("name", [name for name in REWARDS if name.startswith("scene")])
def test_scene_rewards_need_scene_metadata(name: str, claim: dict[str, Any]) -> None:
    good = scene_metadata(_scene(), CaptionParts())
    with pytest.raises(RewardError, match=rf"'{name}'.*sample 1 holds no scene.*needs scene metadata"):
        _score(name, _pictures(_scene(), _scene()), [good, claim])


def test_scene_rewards_name_the_wrong_picture_size() -> None:
    with pytest.raises(RewardError, match=r"'scene'.*expected shape \(B, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        _score("scene", torch.zeros(1, 3, 32, 32), [scene_metadata(_scene(), CaptionParts())])


@pytest.mark.parametrize("name", RULES)
def test_rewards_score_each_sample_by_itself(name: str) -> None:
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng) for _ in range(5)]
    metadata = [scene_metadata(scene, CaptionParts()) for scene in [*scenes[1:], scenes[0]]]
    together = _score(name, _pictures(*scenes), metadata)
    apart = [_score(name, _pictures(scene), [claim]) for scene, claim in zip(scenes, metadata, strict=True)]
    assert together.dtype == torch.float32
    assert together.shape == (5,)
    torch.testing.assert_close(torch.cat(apart), together, rtol=0, atol=1e-6)


# --- The registry and the call


IMAGES = torch.full((2, 3, 4, 4), 0.25)


def _constant(value: Any) -> Reward:
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        result: Tensor = value
        return result

    return reward


def _raising(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    raise KeyError("weights")


class OnDevice:
    def __init__(self, device: str) -> None:
        if device == "cuda:9":
            raise RuntimeError("no such device")
        self.device = device

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return torch.zeros(len(images))


NOT_CALLABLE = 3


def _call(reward: Reward) -> Tensor:
    return score("mine", reward, IMAGES, ["a", "b"], [{}, {}])


@pytest.mark.parametrize("name", RULES)
def test_every_registered_reward_loads(name: str) -> None:
    assert callable(load_reward(name))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RewardError) as caught:
        load_reward("rednes")
    assert "'rednes'" in str(caught.value)
    assert "did you mean 'redness'" in str(caught.value)
    assert all(name in str(caught.value) for name in REWARDS)


def test_import_paths_name_the_callable_and_classes_get_the_device() -> None:
    assert load_reward(f"{__name__}:_raising") is _raising
    made = load_reward(f"{__name__}:OnDevice", device="cuda")
    assert isinstance(made, OnDevice)
    assert made.device == "cuda"


@pytest.mark.parametrize(
    ("name", "device", "told"),
    [
        ("no_such_module:thing", "cpu", "ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{__name__}:absent", "cpu", "AttributeError"),
        (f"{__name__}:OnDevice", "cuda:9", "RuntimeError: no such device"),
        (f"{__name__}:NOT_CALLABLE", "cpu", "is a int, not a callable"),
        ("../etc/passwd:x", "cpu", "is no reward"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, device: str, told: str) -> None:
    with pytest.raises(RewardError, match=told) as caught:
        load_reward(name, device)
    assert repr(name) in str(caught.value)


def test_a_raising_reward_is_an_error_that_names_it_and_its_cause() -> None:
    with pytest.raises(RewardError, match="reward 'mine' raised KeyError: 'weights'") as caught:
        _call(_raising)
    assert isinstance(caught.value.__cause__, KeyError)


class Scaled:
    """Takes arguments by a model of its own."""

    class Options(BaseModel, extra="forbid"):
        factor: float = 1.0
        file: str | None = None

    def __init__(self, device: str, options: Options) -> None:
        self.device, self.options = device, options

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.options.factor * images.mean(dim=(1, 2, 3))


class Broken:
    Options = {"factor": 1.0}  # noqa: RUF012


def test_an_import_path_s_own_options_are_checked_and_given() -> None:
    name = f"{__name__}:Scaled"
    reward = load_reward(name, "cpu", {"factor": 3})
    assert _call(reward).tolist() == [0.75, 0.75]
    assert _call(load_reward(name)).tolist() == [0.25, 0.25]
    for options, told in (
        ({"facter": 3}, r"options.facter: unknown key; did you mean 'factor'\? allowed: factor, file"),
        ({"factor": "much"}, r"options.factor: .*valid number"),
    ):
        with pytest.raises(RewardError, match=rf"reward '{name}': {told}"):
            find_reward(name, options)
    with pytest.raises(RewardError, match=r"options: factor: it takes none; a class that does has an attribute Opt"):
        find_reward(f"{__name__}:_raising", {"factor": 1})
    with pytest.raises(RewardError, match="its Options must be a pydantic model"):
        find_reward(f"{__name__}:Broken", {"factor": 1})


@pytest.mark.parametrize("name", REWARD_OPTIONS)
def test_a_registered_reward_takes_what_the_configuration_checks(name: str) -> None:
    # What has no default.
    required = {
        "process": {"reward": "redness", "environment": "envs/redness"},
        "judge": {"url": "http://127.0.0.1:9", "model": "m"},
    }
    found, _ = find_reward(name, required.get(name))
    assert found.Options is REWARD_OPTIONS[name]


# --- Where


def _where(value: Any, images: Tensor = IMAGES) -> Tensor:
    found = score_where("mine", lambda *_: Scored(torch.zeros(2), value), images, ["a", "b"], [{}, {}])
    assert found.where is not None
    return found.where


def test_where_is_carried_through_on_any_grid() -> None:
    value = torch.tensor([[[0.0, 2.0]], [[1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    found = _where(value)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.tolist() == value.tolist()
    assert _where(torch.ones(2, 3, 1, 1), torch.zeros(2, 3, 3, 4, 4)).shape == (2, 3, 1, 1)
    assert score_where("mine", _constant(torch.zeros(2)), IMAGES, ["a", "b"], [{}, {}]).where is None
    assert _call(lambda *_: Scored(torch.ones(2), value)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([[1.0]], "expected a tensor, got a list"),
        (torch.ones(2, 4), r"expected shape \(2, h, w\), got \(2, 4\)"),
        (torch.ones(3, 4, 4), r"expected shape \(2, h, w\), got \(3, 4, 4\)"),
        (torch.ones(2, 5, 4, 4), r"expected shape \(2, h, w\), got \(2, 5, 4, 4\)"),
        (torch.ones(2, 0, 4), r"expected shape \(2, h, w\), got \(2, 0, 4\)"),
        (torch.full((2, 4, 4), -0.1), "below 0"),
        (torch.full((2, 4, 4), float("nan")), "not finite"),
        (torch.full((2, 4, 4), float("inf")), "not finite"),
        (torch.ones(2, 4, 4, dtype=torch.complex64), "dense tensor of real numbers"),
    ],
)
def test_a_wrong_where_is_refused(value: Any, told: str) -> None:
    with pytest.raises(RewardError, match=rf"reward 'mine'.*{told}"):
        _where(value)


def test_of_a_picture_that_is_not_finite_nothing_is_told() -> None:
    images = IMAGES.clone()
    images[1, 0, 0, 0] = float("nan")
    assert _where(torch.full((2, 1, 1), float("nan")).index_fill(0, torch.tensor([0]), 3.0), images).tolist() == [
        [[3.0]],
        [[0.0]],
    ]


def test_object_redness_tells_the_object_s_pixels() -> None:
    scene = _scene(x=-12.0)
    found = score_where("object_redness", load_reward("object_redness"), _pictures(scene), ["a"], [{}])
    assert found.where is not None
    mask = torch.from_numpy(object_mask(scene.objects[0]))
    assert found.where.shape == (1, 64, 64)
    assert found.where[0][mask > 0.99].min() == 1
    assert found.where[0][mask == 0].max() == 0


# --- Networks and where they are


class Moving(nn.Module):
    """Keeps where it was sent to."""

    def __init__(self, moves: list[str]) -> None:
        super().__init__()
        self.moves = moves
        self.weight = nn.Parameter(torch.ones(1))

    def to(self, *places: Any, **_: Any) -> "Moving":
        self.moves.append(str(places[0]))
        return self


@pytest.mark.parametrize(
    ("policy", "moves"),
    [
        ("keep", ["read", "cuda:1", "cuda:1"]),
        ("offload", ["read", "cuda:1", "cpu", "cuda:1", "cpu"]),
        ("free", ["read", "cuda:1", "read", "cuda:1"]),
    ],
)
def test_a_network_is_where_its_policy_says(policy: Any, moves: list[str]) -> None:
    log: list[str] = []

    def load() -> Moving:
        log.append("read")
        return Moving(log)

    reward: Any = type("Holder", (), {})()
    reward.resident = Resident(load, "cuda:1", policy)
    assert log == []
    for _ in range(2):
        # Uses inside a use move nothing.
        with in_use(reward) as network, reward.resident as again:
            assert again is network
            assert not network.training
            assert not network.weight.requires_grad
    assert log == moves
    with in_use(_raising) as nothing:
        assert nothing is None


def test_rewards_on_one_network_are_used_at_once() -> None:
    shared = Resident(lambda: Moving([]), "cuda:1", "free")
    first, third = (type("Holder", (), {"resident": shared})() for _ in range(2))
    groups = by_network({"a": first, "b": _raising, "c": third, "d": _raising})
    assert groups == [{"a": first, "c": third}, {"b": _raising}, {"d": _raising}]


def test_an_error_ends_a_use() -> None:
    log: list[str] = []
    resident = Resident(lambda: Moving(log), "cuda:1", "offload")
    with pytest.raises(KeyError), resident:
        raise KeyError
    assert log == ["cuda:1", "cpu"]


def test_an_interrupt_is_not_an_error_of_the_reward() -> None:
    def interrupted(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _call(interrupted)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, r"expected a tensor of shape \(2,\), got a NoneType"),
        ([1.0, 2.0], r"expected a tensor of shape \(2,\), got a list"),
        (torch.zeros(2, 1), r"expected shape \(2,\), got \(2, 1\)"),
        (torch.zeros(3), r"expected shape \(2,\), got \(3,\)"),
        (torch.tensor(1.0), r"expected shape \(2,\), got \(\)"),
        (np.zeros(2), r"expected a tensor of shape \(2,\), got a ndarray"),
        (torch.zeros(2, dtype=torch.complex64), r"expected a dense tensor of real numbers, got torch.complex64"),
        (torch.zeros(2).to_sparse(), r"expected a dense tensor of real numbers, got torch.float32, torch.sparse_coo"),
        (torch.zeros(2, device="meta"), r"expected a dense tensor of real numbers, got .* on meta"),
    ],
)
def test_a_wrong_result_is_refused(value: Any, told: str) -> None:
    with pytest.raises(RewardError, match=rf"reward 'mine': {told}"):
        _call(_constant(value))


def test_what_is_not_finite_stays_in_place() -> None:
    scores = _call(_constant(torch.tensor([float("nan"), float("-inf")])))
    assert scores.isnan().tolist() == [True, False]
    assert scores[1] == float("-inf")


@pytest.mark.parametrize("name", ["redness", "object_redness", "scene_count"])
def test_a_picture_that_is_not_finite_has_no_score(name: str) -> None:
    images = _pictures(_scene(), _scene(), _scene())
    images[1, 2, 5, 5] = float("nan")
    images[2] = float("inf")
    scores = _score(name, images, [scene_metadata(_scene(), CaptionParts())] * 3)
    assert scores.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_results_are_float32_on_the_cpu_without_gradient(dtype: torch.dtype) -> None:
    scores = _call(_constant(torch.tensor([1, 0], dtype=dtype)))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 0.0]
    assert not _call(_constant(torch.ones(2, requires_grad=True))).requires_grad
    assert _call(_constant(nn.Parameter(torch.ones(2)))).tolist() == [1.0, 1.0]


class Logged(Tensor):
    """Breaks whatever is done with it from outside."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in ("masked_fill", "to"):
            raise RuntimeError("not with me")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_of_tensor_is_taken_as_a_tensor() -> None:
    scores = _call(_constant(torch.ones(2).as_subclass(Logged)))
    assert type(scores) is Tensor
    assert scores.tolist() == [1.0, 1.0]


def test_no_graph_is_kept_while_a_reward_computes() -> None:
    assert _call(lambda images, prompts, metadata: torch.full((2,), torch.is_grad_enabled())).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("images", "prompts", "metadata", "told"),
    [
        (torch.zeros(2, 1, 4, 4), 2, 2, r"images: expected float32 of shape \(B, 3, H, W\) or .*\(2, 1, 4, 4\)"),
        (torch.zeros(3, 4, 4), 2, 2, r"images: expected float32 of shape \(B, 3, H, W\) or .*\(3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 2, 2, r"images: expected float32.*uint8"),
        (IMAGES, 3, 2, r"prompts: expected 2 as in images \(2, 3, 4, 4\), got 3"),
        (IMAGES, 2, 1, r"metadata: expected 2 as in images \(2, 3, 4, 4\), got 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(images: Tensor, prompts: int, metadata: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        score("redness", load_reward("redness"), images, ["a"] * prompts, [{}] * metadata)


def test_redness_takes_videos_and_the_others_say_that_they_do_not() -> None:
    videos = torch.rand(2, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = score("redness", load_reward("redness"), videos, ["", ""], [{}, {}])
    frames = [score("redness", load_reward("redness"), videos[:, t], ["", ""], [{}, {}]) for t in range(5)]
    torch.testing.assert_close(found, torch.stack(frames).mean(dim=0))
    for name in RULES:
        if name != "redness":
            with pytest.raises(RewardError, match=rf"reward '{name}' raised .*not videos of shape \(2, 5, 3, 64, 64\)"):
                score(name, load_reward(name), videos, ["", ""], [{}, {}])
