"""Drawn clips: what moves where, what captions say, and the reward that reads the object when the clip ends."""

import numpy as np
import pytest
import torch

from vipo.config.pretrain import PretrainConfig
from vipo.demo import motion, scenes
from vipo.demo.seen import foreground
from vipo.generators.frames import causal_frame_groups
from vipo.rewards import score
from vipo.rewards.errors import RewardError
from vipo.rewards.late_redness import late_redness
from vipo.rewards.object_redness import object_redness
from vipo.training.pretrain_parts import build_pool


def _clip(direction: str, color: str = "red") -> torch.Tensor:
    """``(9, 3, 32, 32)``."""
    item = motion.MovingShape("circle", color, "white", direction, 0.0, 0.0, 5.0)
    return torch.from_numpy(motion.draw(item)).transpose(0, 1)


@pytest.mark.parametrize(
    ("direction", "step"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))]
)
def test_the_shape_moves_as_its_caption_says(direction: str, step: tuple[int, int]) -> None:
    frames = _clip(direction)
    assert frames.shape == (motion.FRAMES, 3, motion.SIZE, motion.SIZE)
    places = []
    for mask in foreground(frames):
        rows, columns = mask.nonzero(as_tuple=True)
        places.append([float(columns.double().mean()), float(rows.double().mean())])
    moved = np.diff(np.array(places), axis=0)
    # 1.25 pixels a frame; which pixels count is whole.
    assert moved.mean(axis=0) == pytest.approx([1.25 * step[0], 1.25 * step[1]], abs=0.05)
    # The middle frame has it in the middle, and it never leaves the picture.
    assert places[motion.FRAMES // 2] == pytest.approx([15.5, 15.5], abs=0.01)
    assert not foreground(frames)[:, :2].any()


def test_captions_name_shape_direction_and_background() -> None:
    item = motion.MovingShape("square", "blue", "gray", "up", 0.0, 0.0, 5.0)
    assert motion.captions(item) == (
        "a square moves up on a gray background",
        "a blue square moves up on a gray background",
    )
    rows = dict(motion.colourless_captions())
    assert len(rows) == 3 * 4 * 4
    assert rows["a square moves up on a gray background"] == {
        "objects": [{"shape": "square"}],
        "background": "gray",
        "direction": "up",
    }


def test_held_out_captions_are_never_drawn() -> None:
    pool = build_pool(PretrainConfig(drawn="motion", scenes=300))
    assert pool.images.shape == (300, 3, motion.FRAMES, motion.SIZE, motion.SIZE)
    assert not any(scenes.is_held_out(text) for texts in pool.captions for text in texts)


def test_late_redness_reads_the_later_half_alone() -> None:
    """Of nine frames the last four: those of the last latent frame."""
    red, blue = _clip("right"), _clip("right", "blue")
    turns = torch.cat([blue[:5], red[5:]])
    back = torch.cat([red[:5], blue[5:]])
    clips = torch.stack([red, blue, turns, back])
    found = late_redness(clips, [""] * 4, [{}] * 4)
    expected = [
        sum(float(object_redness(clip[frame : frame + 1], [""], [{}]).scores) for frame in range(5, 9)) / 4
        for clip in clips
    ]
    assert found.scores.tolist() == pytest.approx(expected)
    assert found.scores[2] == found.scores[0]
    assert found.scores[3] == found.scores[1]
    assert found.where is not None
    assert found.where.shape == (4, 9, 32, 32)
    assert causal_frame_groups(9)[-1] == range(5, 9)
    assert not found.where[:, :5].any()
    assert torch.equal(found.where[0, 5:].bool(), foreground(red[5:]))


def test_late_redness_takes_clips() -> None:
    with pytest.raises(RewardError, match="takes videos"):
        score("late_redness", late_redness, torch.rand(1, 3, 8, 8), [""], [{}])
