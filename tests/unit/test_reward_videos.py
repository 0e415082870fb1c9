"""Rewards of clips: flicker against a loop, motion against torchvision's RAFT pair by pair, on random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vipo.rewards import RewardError, in_use, load_reward, score, score_where, weight_files


def clips(frames: int = 4, height: int = 128, width: int = 136, count: int = 2) -> Tensor:
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def told(count: int) -> tuple[list[str], list[dict[str, Any]]]:
    return ["a clip"] * count, [{}] * count


def test_flicker_is_the_mean_change_between_frames() -> None:
    videos = clips(height=6, width=5, count=3)
    videos[2] = videos[2, :1]
    found = score_where("flicker", load_reward("flicker"), videos, *told(3))
    array = videos.double().numpy()
    for number in range(3):
        changes = [np.abs(array[number, t + 1] - array[number, t]) for t in range(3)]
        assert found.scores[number].item() == pytest.approx(1 - np.mean(changes), abs=1e-6)
        assert found.where is not None
        expected = [changes[0], (changes[0] + changes[1]) / 2, (changes[1] + changes[2]) / 2, changes[2]]
        np.testing.assert_allclose(found.where[number].numpy(), [x.mean(axis=0) for x in expected], atol=1e-6)
    assert found.scores[2] == 1


@pytest.mark.parametrize("name", ["flicker", "motion"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 3, 8, 8)])
def test_pictures_are_refused(name: str, shape: tuple[int, ...], raft: Path) -> None:
    reward = load_reward(name, "cpu", {"path": str(raft)} if name == "motion" else {})
    with pytest.raises(RewardError, match=r"takes videos .* of two frames or more"):
        score(name, reward, torch.zeros(shape), *told(2))


@pytest.fixture(scope="module")
def raft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torchvision's large RAFT, in a file as torchvision publishes it."""
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft_large.pth"
    torch.save(raft_large(weights=None).state_dict(), path)
    return path


def test_motion_is_the_largest_flows_of_each_pair(raft: Path) -> None:
    from torchvision.models.optical_flow import raft_large

    videos = clips(frames=3)
    reward = load_reward("motion", "cpu", {"path": str(raft)})
    found = score_where("motion", reward, videos, *told(2))
    network = raft_large(weights=None).eval()
    network.load_state_dict(torch.load(raft, weights_only=True))
    for number, video in enumerate(videos):
        lengths = []
        for before, after in ((video[0], video[1]), (video[1], video[2])):
            with torch.no_grad():
                flow = network(2 * before[None] - 1, 2 * after[None] - 1, num_flow_updates=20)[-1][0]
            lengths.append((flow[0] ** 2 + flow[1] ** 2).sqrt() / 128 * 256)
        largest = [float(np.sort(length.numpy().ravel())[::-1][: int(0.05 * 128 * 136)].mean()) for length in lengths]
        assert found.scores[number].item() == pytest.approx(np.mean(largest), rel=1e-3)
        assert found.where is not None
        torch.testing.assert_close(found.where[number][0], lengths[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found.where[number][1], (lengths[0] + lengths[1]) / 2, rtol=1e-2, atol=1e-2)
    assert torch.equal(score("motion", reward, videos, *told(2)), found.scores)
    apart = load_reward("motion", "cpu", {"path": str(raft), "batch": 1})
    torch.testing.assert_close(score("motion", apart, videos, *told(2)), found.scores, rtol=1e-4, atol=1e-4)
    assert weight_files(reward) == [raft]


def test_motion_takes_any_size_and_keeps_the_gradient(raft: Path) -> None:
    reward = load_reward("motion", "cpu", {"path": str(raft)})
    videos = clips(frames=2, height=30, width=44, count=1)
    found = score_where("motion", reward, videos, *told(1))
    assert found.where is not None
    assert found.where.shape == (1, 2, 30, 44)
    with in_use(reward):
        pixels = videos.clone().requires_grad_()
        scores, _ = reward(pixels, *told(1))
        (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.abs().sum() > 0
    with pytest.raises(RewardError, match=r"path 'absent.pth': there is no such file"):
        load_reward("motion", "cpu", {"path": "absent.pth"})
