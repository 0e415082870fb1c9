"""A picture's reward of clips: the mean over evenly spread frames."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vipo.config.compose import load_config
from vipo.config.experiment import check_run
from vipo.config.reward import RewardConfig, RewardSpec
from vipo.config.validation import ConfigError
from vipo.rewards import Scored, load_rewards, score_where, weight_files
from vipo.rewards.frames import OfFrames
from vipo.rewards.registry import RewardError, begin

VIDEO = ("experiment=demo_video", "arm=vipo")


class _Seen:
    """Brightness of pictures, and where."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[str]]] = []

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scored:
        assert images.ndim == 4
        assert [own["number"] for own in metadata] == [int(prompt[-1]) for prompt in prompts]
        self.asked.append((len(images), list(prompts)))
        return Scored(images.flatten(1).mean(dim=1), images.mean(dim=1))


def _clips(frames: int) -> Tensor:
    """Frame t of the first clip is all t / 10, of the second t / 20."""
    levels = torch.arange(frames) / torch.tensor([[10.0], [20.0]])
    return levels[:, :, None, None, None].expand(2, frames, 3, 4, 6).contiguous()


@pytest.mark.parametrize(
    ("frames", "count", "read"), [(9, 3, [0, 4, 8]), (9, 4, [0, 3, 5, 8]), (2, 4, [0, 1]), (5, 1, [0])]
)
def test_it_is_the_mean_over_evenly_spread_frames(frames: int, count: int, read: list[int]) -> None:
    inner = _Seen()
    found = score_where("seen", OfFrames(inner, count), _clips(frames), ["a0", "b1"], [{"number": 0}, {"number": 1}])
    assert inner.asked == [(2 * len(read), ["a0"] * len(read) + ["b1"] * len(read))]
    mean = sum(read) / len(read)
    torch.testing.assert_close(found.scores, torch.tensor([mean / 10, mean / 20]))
    # Frames that were not read have the map of the nearest one that was.
    assert found.where is not None
    assert found.where.shape == (2, frames, 4, 6)
    nearest = [min(read, key=lambda place: abs(place - frame)) for frame in range(frames)]
    torch.testing.assert_close(found.where[0, :, 0, 0], torch.tensor(nearest) / 10)


def test_its_gradient_is_that_of_the_mean() -> None:
    clips = _clips(5).requires_grad_()
    OfFrames(lambda images, prompts, metadata: images.flatten(1).sum(dim=1), 3)(
        clips, ["a", "b"], [{}, {}]
    ).sum().backward()
    assert clips.grad is not None
    per_frame = clips.grad.flatten(2).sum(dim=2)[0] / (3 * 4 * 6)
    torch.testing.assert_close(per_frame, torch.tensor([1, 0, 1, 0, 1]) / 3)


def test_pictures_are_refused() -> None:
    with pytest.raises(RewardError, match=r"reads frames of videos \(B, T, 3, H, W\), not pictures of shape"):
        score_where("seen", OfFrames(_Seen(), 2), torch.zeros(1, 3, 4, 4), ["a0"], [{"number": 0}])


def test_a_reward_that_begins_early_is_given_the_frames() -> None:
    class Early(_Seen):
        weight_files: tuple[Path, ...] = (Path("head.pth"),)

        def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
            self(images, prompts, metadata)

    inner = Early()
    # As one of vipo's own: of another it could mean anything.
    Early.__module__ = "vipo.rewards.early_test"
    begin(OfFrames(inner, 2), _clips(5), ["a0", "b1"], [{"number": 0}, {"number": 1}])
    assert inner.asked == [(4, ["a0", "a0", "b1", "b1"])]
    assert weight_files(OfFrames(inner, 2)) == (Path("head.pth"),)


def test_a_configuration_says_of_how_many_frames() -> None:
    spec = RewardSpec.model_validate({"name": "object_redness", "frames": 3})
    assert spec.model_dump(mode="json") == {"name": "object_redness", "frames": 3}
    assert RewardSpec(name="object_redness").model_dump(mode="json") == "object_redness"
    (found,) = load_rewards(
        RewardConfig.model_validate({"terms": [{"name": "object_redness", "frames": 3}]}).terms
    ).values()
    assert isinstance(found, OfFrames)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            [*VIDEO, "reward.terms=[clipscore]"],
            r"reward.terms: reward 'clipscore' takes pictures, .* set the reward's frames",
        ),
        ([*VIDEO, "reward.terms=[{name: flicker, frames: 2}]"], "reward 'flicker' scores no single frames"),
        (
            ["experiment=demo", "arm=vipo", "reward.terms=[{name: ocr, frames: 2}]"],
            "'ocr' scores pictures, generator.frames is",
        ),
    ],
)
def test_what_does_not_fit_the_samples_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_run(load_config(overrides))


@pytest.mark.parametrize("name", ["clipscore", "redness", "'my_rewards:Own'"])
def test_frames_of_a_picture_reward_are_accepted_where_clips_are_made(name: str) -> None:
    check_run(load_config([*VIDEO, f"reward.terms=[{{name: {name}, frames: 2}}]"]))


@pytest.mark.parametrize("found", [torch.zeros(2), torch.zeros(6, 1), (torch.zeros(6), None), 0.5])
def test_a_reward_that_does_not_score_each_frame_is_named(found: Any) -> None:
    with pytest.raises(RewardError, match=r"expected 6 scores, one of each frame that it was given, got"):
        OfFrames(lambda images, prompts, metadata: found, 3)(_clips(5), ["a", "b"], [{}, {}])
