"""How samples are written, and what is measured on them, for pictures and for videos."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from torch import Tensor

from vipo.evaluation.held_out import save_sample
from vipo.evaluation.measures import image_change


def _read(path: Path) -> Tensor:
    with Image.open(path) as file:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
    return torch.from_numpy(np.stack(frames)).movedim(-1, -3)


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    moving=st.integers(0, 5),
)
def test_every_frame_of_a_video_is_read_back(
    numbers: list[int], moving: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Equal neighbours too, which Pillow would merge, and frames that differ in a corner only."""
    pictures = torch.randint(0, 256, (3, 3, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames = pictures[numbers].clone()
    frames[len(frames) // 2 :, :, 0, moving] = 7
    path = tmp_path_factory.mktemp("apng") / "v.png"
    save_sample(frames / 255, path, 16)
    assert torch.equal(_read(path), frames)
    with Image.open(path) as file:
        assert file.n_frames == len(frames)
        if len(frames) > 1:
            assert file.info["duration"] == pytest.approx(62.5)


def test_a_picture_is_one_frame(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_sample(image / 255, tmp_path / "p.png")
    assert torch.equal(_read(tmp_path / "p.png"), image[None])


def test_change_of_a_video_is_the_mean_over_its_frames() -> None:
    images, base = torch.rand(2, 2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = image_change(images, base, scene=False)
    frames = [image_change(images[:, t], base[:, t], scene=False)["change/total"] for t in range(5)]
    assert list(found) == ["change/total"]
    torch.testing.assert_close(found["change/total"], torch.stack(frames).mean(dim=0))
