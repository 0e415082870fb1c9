"""Rewards by their authors' own packages: what is handed to a package and what is read of its answer, by stand-ins."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from vipo.rewards.served import originals
from vipo.rewards.served.originals import DIMENSIONS, HPSv2, VBench

CLIP = [Image.new("RGB", (16, 16))] * 2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[dict[str, Any]]]:
    """What a stand-in of the package was given by call. It scores 50 and more, each clip one more, and reads a file."""
    weights, calls = tmp_path / "cache" / "net.pth", []
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    (weights.parent / "token").write_text("hf_secret")
    (weights.parent / "of_the_hub.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(weights.parent)
    monkeypatch.delitem(sys.modules, "of_the_hub", raising=False)

    def compute(listed: str, device: Any, parts: Any) -> tuple[float, list[dict[str, Any]]]:
        assert Path(parts["path"]).read_bytes() == b"weights"
        # As who asks a hub: whose token it is changes nothing, and code is read but once.
        (weights.parent / "token").read_bytes()
        importlib.import_module("of_the_hub")
        rows = json.loads(Path(listed).read_text())
        calls.append(rows)
        clips = [(row["prompt_en"], clip) for row in rows for clip in row["video_list"]]
        assert all(Path(clip).is_file() for _, clip in clips)
        # As the package does: not in the order that was asked, and a clip it cannot read is missing.
        known = [(number, clip) for number, (text, clip) in enumerate(clips) if text != "unread"]
        told = [{"video_path": clip, "video_results": 50 + number} for number, clip in known]
        return 0.5, told[::-1]

    utils = ModuleType("vbench.utils")
    utils.init_submodules = lambda dimensions: {dimensions[0]: {"path": str(weights)}}  # type: ignore[attr-defined]
    for name in DIMENSIONS:
        module = ModuleType(f"vbench.{name}")
        setattr(module, f"compute_{name}", compute)
        monkeypatch.setitem(sys.modules, f"vbench.{name}", module)
    monkeypatch.setitem(sys.modules, "vbench", ModuleType("vbench"))
    monkeypatch.setitem(sys.modules, "vbench.utils", utils)
    monkeypatch.setattr(originals, "_write_clip", lambda frames, path, rate: Path(path).write_bytes(b"clip"))
    return calls


@pytest.mark.parametrize(
    ("dimension", "scale"), [("imaging_quality", 100), ("motion_smoothness", 1), ("human_action", 1)]
)
def test_scores_are_of_the_clips_in_order_and_in_the_units_of_the_total(
    dimension: str, scale: int, asked: list[list[dict[str, Any]]]
) -> None:
    reward = VBench("cpu", dimension)
    # The same prompt twice, one with a slash, one too long for a file's name.
    texts = ["a/b\0", "a/b\0", "unread", "é" * 300]
    found = reward([CLIP] * 4, texts, [{}] * 4)
    assert found[2] != found[2]
    assert [found[place] for place in (0, 1, 3)] == [value / scale for value in (50.0, 51.0, 53.0)]
    assert [row["prompt_en"] for row in asked[-1]] == texts
    assert [row["dimension"] for row in asked[-1]] == [[dimension]] * 4


def test_an_action_is_looked_for_by_the_clip_s_name(asked: list[list[dict[str, Any]]]) -> None:
    VBench("cpu", "human_action")([CLIP], ["A person is riding a bike"], [{}])
    ((row,),) = asked[1:]
    # The package's own words.
    label = row["video_list"][0].split("/")[-1].lower().split("-")[0].split("person is ")[-1].split("_")[0]
    assert label == "riding a bike"


def test_what_a_dimension_reads_is_told_and_another_dimension_refused(
    asked: list[list[dict[str, Any]]], tmp_path: Path
) -> None:
    for _ in range(2):
        assert VBench("cpu", "aesthetic_quality").weight_files == [tmp_path / "cache" / "net.pth"]
    with pytest.raises(
        ValueError, match=r"dimension 'object_class': its package can be asked for subject_consistency, "
    ):
        VBench("cpu", "object_class")
    style = VBench("cpu", "appearance_style")
    with pytest.raises(ValueError, match="'a cat' has no auxiliary_info of appearance_style"):
        style([CLIP], ["a cat"], [{}])
    row = {"auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}}}
    style([CLIP], ["The bund Shanghai, oil painting"], [row])
    assert asked[-1][0]["auxiliary_info"] == row["auxiliary_info"]


def test_a_checkpoint_is_read_once_a_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[list[Any], str]] = []

    def score(pictures: list[Any], text: str, cp: str, hps_version: str) -> list[float]:
        calls.append((pictures, text))
        return [float(picture) for picture in pictures]

    package, module, utils, hub = (
        ModuleType(name) for name in ("hpsv2", "hpsv2.img_score", "hpsv2.utils", "huggingface_hub")
    )
    module.score = score  # type: ignore[attr-defined]
    package.img_score = module  # type: ignore[attr-defined]
    utils.hps_version_map = {}  # type: ignore[attr-defined]
    hub.hf_hub_download = None  # type: ignore[attr-defined]
    for stand_in in (package, module, utils, hub):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    reward = HPSv2("cpu", checkpoint=str(tmp_path / "c.pt"))
    assert reward([1, 2, 3, 4], ["a", "b", "a", "b"], [{}] * 4) == [1, 2, 3, 4]
    assert calls == [([1, 3], "a"), ([2, 4], "b")]
    module.score = lambda *_, **__: [1.0]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="expected 2 scores of 'a', got 1"):
        reward([1, 2], ["a", "a"], [{}] * 2)
