"""A run that is watched: its sheets and trackers show it, and its bytes are those of one that nobody watches."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vipo.config.compose import load_config, repository_root
from vipo.maps.sheet import ShownGroup, sample_sheet
from vipo.training.run import train
from vipo.training.setup import Setup, set_up
from vipo.training.sheets import sheet_of
from vipo.training.state import run_identity

ROOT = repository_root()


def _setup(results: Path, overrides: list[str], *more: str) -> Setup:
    return set_up(load_config([*overrides, "arm=vipo", *more]), ROOT, results / "demo")


def _trained(results: Path, overrides: list[str], *more: str) -> Path:
    setup = _setup(results, overrides, *more)
    train(setup, run_identity(setup))
    return setup.folder


def _bytes(run: Path) -> dict[str, bytes]:
    files = [run / "metrics.jsonl", *run.glob("weights/**/*.safetensors"), *run.glob("updates/**/*.safetensors")]
    assert len(files) == 3
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


class Raising:
    """A tracker that breaks whatever it can."""

    def __init__(self, run: Any) -> None:
        torch.manual_seed(0)

    def log(self, row: Any) -> None:
        torch.set_num_threads(2)
        raise RuntimeError("no network")

    def close(self) -> None:
        raise AssertionError("it was left out before")


def test_who_watches_changes_no_byte(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone, watched = shutil.copytree(prepared, tmp_path / "alone"), shutil.copytree(prepared, tmp_path / "watched")
    first = _trained(alone, tiny_overrides, "tracking={trackers: [], sheet_every: null}")
    assert not any((first / name).exists() for name in ("tb", "sheets", "trackers"))
    trackers = f"tracking.trackers=[tensorboard,'{__name__}:Raising']"
    # Another rhythm in the second half: the checkpoint is gone on from.
    _trained(watched, tiny_overrides, trackers, "tracking.sheet_every=2", "training.updates=4")
    shutil.rmtree(watched / "demo/runs/vipo-s0/checkpoints/000004")
    second = _trained(watched, tiny_overrides, "tracking.sheet_every=3", "training.updates=4")
    assert _bytes(first) == _bytes(second)
    assert caplog.text.count("Raising' raised RuntimeError: no network; the run goes on without it") == 1
    assert sorted(path.name for path in (second / "sheets").iterdir()) == [f"{n:06d}.png" for n in (1, 2, 4)]
    board = EventAccumulator(str(second / "tb")).Reload()
    assert [event.step for event in board.Scalars("reward/mean")] == [1, 2, 3, 4]
    assert [image.step for image in board.Images("samples")] == [1, 2, 4]
    assert "time/sheet" in board.Tags()["scalars"]
    assert "time/track" in board.Tags()["scalars"]


def test_a_sheet_is_drawn_in_its_turn_alone(prepared: Path, tiny_overrides: list[str]) -> None:
    setup = _setup(prepared, tiny_overrides, "tracking.sheet_every=3")
    assert [number for number in range(1, 8) if sheet_of(setup, number)] == [1, 3, 6]
    never = _setup(prepared, tiny_overrides, "tracking.sheet_every=null")
    assert not any(sheet_of(never, number) for number in range(1, 8))


def test_a_sheet_shows_each_sample_and_its_map_below() -> None:
    """One colour a sample; a map that is all on the left lights up the left half alone."""
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    pictures = colours[:, :, None, None].expand(3, 3, 64, 64)
    maps = torch.zeros(3, 8, 8)
    maps[:, :, :4] = 1
    text = "a \x1b[31mprompt that is far longer than any sheet of three pictures is wide, " * 9
    sheet = np.asarray(sample_sheet([ShownGroup(text, pictures, maps), ShownGroup("plain", pictures[:2], None)]))
    # Of 64 pixels 128 are made; a caption of 16 pixels and gaps of 4.
    assert sheet.shape == (16 + 2 * 132 + 16 + 132, 3 * 132, 3)
    for column in range(3):
        middle = 132 * column + 64
        assert (sheet[16 + 64, middle] == (255 * colours[column]).numpy()).all()
        left, right = sheet[16 + 132 + 64, middle - 50].astype(int), sheet[16 + 132 + 64, middle + 50].astype(int)
        assert left.sum() > right.sum() + 200
    assert (sheet[16 + 2 * 132 + 16 + 64, 2 * 132 + 64] == 255).all()


@pytest.mark.parametrize(("size", "shown"), [((512, 256), (192, 96)), ((40, 20), (120, 60)), ((96, 100), (96, 100))])
def test_pictures_of_any_size_can_be_seen(size: tuple[int, int], shown: tuple[int, int]) -> None:
    sheet = sample_sheet([ShownGroup("x", torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)), None)])
    assert sheet.size == (max(120, 2 * (shown[1] + 4)), 16 + shown[0] + 4)


def test_a_clip_is_shown_by_its_middle_frame_and_that_frames_map(tmp_path: Path) -> None:
    """Nine frames are three latent ones, 0, 1 to 4 and 5 to 8: frame 4 belongs to the second."""
    from types import SimpleNamespace

    from vipo.training import sheets

    clip = torch.zeros(1, 9, 3, 128, 128)
    clip[:, 4] = 1
    weights = torch.zeros(1, 3, 4, 4)
    weights[:, 1] = 1
    sample = SimpleNamespace(group=0, index=0, prompt=SimpleNamespace(text="a clip"))
    rollouts: Any = SimpleNamespace(samples=[sample], rows=[0], pictures=clip)
    # The same for each of two transitions.
    sheets._draw(tmp_path / "sheet.png", rollouts, torch.stack([weights, weights], dim=1))
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture)
    assert (pixels[16 + 64, 64] == 255).all()
    # The colour of the largest weight, over white.
    assert pixels[16 + 132 + 64, 64].min() > 150
