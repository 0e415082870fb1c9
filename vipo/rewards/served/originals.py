"""Rewards by their authors' own packages, each in its own environment: what `serve.py` serves beside our rewrites.

``serve.py originals:HPSv2`` and so on; the folder of this file is on the path there. Each says which files its weights
are in, and what its texts are read by. Where a package takes other things than Pillow pictures, its own form is made of
them without a loss.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from PIL import Image

Rows = List[Dict[str, Any]]


class HPSv2:
    """Package hpsv2: cosine of picture and text.

    Args:
        device: "cpu", or "cuda" and the like; the package itself takes a GPU wherever there is one.
        checkpoint: file; None: what the package fetches.
        version: of the published checkpoints.
    """

    def __init__(self, device: str, checkpoint: Optional[str] = None, version: str = "v2.1") -> None:
        from hpsv2 import img_score
        from hpsv2.utils import hps_version_map
        from huggingface_hub import hf_hub_download

        img_score.device = device
        self._module, self._version = img_score, version
        self._checkpoint = checkpoint or hf_hub_download("xswu/HPSv2", hps_version_map[version])
        self.weight_files = [self._checkpoint]

    def __call__(self, pictures: list[Any], prompts: list[str], metadata: Rows) -> list[float]:
        """A score each."""
        found = [math.nan] * len(pictures)
        # It reads the whole checkpoint at each call, which takes the pictures of one prompt.
        for text in dict.fromkeys(prompts):
            places = [place for place, prompt in enumerate(prompts) if prompt == text]
            own = [pictures[place] for place in places]
            scores = self._module.score(own, text, cp=self._checkpoint, hps_version=self._version)
            if len(scores) != len(own):
                raise ValueError(f"expected {len(own)} scores of {text[:80]!r}, got {len(scores)}")
            for place, score in zip(places, scores):
                found[place] = float(score)
        return found


class ImageReward:
    """Package image-reward.

    Args:
        device: where it computes.
        checkpoint, med_config: files; None: what the package fetches.
    """

    def __init__(self, device: str, checkpoint: Optional[str] = None, med_config: Optional[str] = None) -> None:
        import ImageReward as package  # noqa: N813
        from huggingface_hub import hf_hub_download

        checkpoint = checkpoint or hf_hub_download("THUDM/ImageReward", "ImageReward.pt")
        med_config = med_config or hf_hub_download("THUDM/ImageReward", "med_config.json")
        # Of the tokenizer too, which it fetches under a name of its own.
        self._model, read = _reading(lambda: package.load(checkpoint, device=device, med_config=med_config))
        self.weight_files = sorted({*read, Path(checkpoint).absolute(), Path(med_config).absolute()})

    def __call__(self, pictures: list[Any], prompts: list[str], metadata: Rows) -> list[float]:
        """A score each."""
        import torch

        with torch.no_grad():
            return [float(self._model.score(text, picture)) for picture, text in zip(pictures, prompts)]


class HPSv3:
    """Package hpsv3: the first of its two numbers.

    Args:
        device: where it computes.
        checkpoint: file; None: what the package fetches.
    """

    def __init__(self, device: str, checkpoint: Optional[str] = None) -> None:
        from hpsv3 import HPSv3RewardInferencer
        from huggingface_hub import hf_hub_download, snapshot_download

        checkpoint = checkpoint or hf_hub_download("MizzenAI/HPSv3", "HPSv3.safetensors")
        # The base model's own weights are wholly overwritten; its texts and pictures are read by these.
        texts = Path(snapshot_download("Qwen/Qwen2-VL-7B-Instruct", allow_patterns=["*.json", "*.txt"]))
        self._model = HPSv3RewardInferencer(checkpoint_path=checkpoint, device=device)
        self.weight_files = [checkpoint, *sorted(p for p in texts.iterdir() if p.suffix in (".json", ".txt"))]

    def __call__(self, pictures: list[Any], prompts: list[str], metadata: Rows) -> list[float]:
        """A score each."""
        import torch

        with torch.no_grad():
            found = self._model.reward(image_paths=pictures, prompts=prompts)
        return [float(row[0]) for row in found]


#: Of its sixteen: the other four need detectron2, which no package index has.
DIMENSIONS = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "human_action", "scene", "appearance_style", "temporal_style",
    "overall_consistency",
)  # fmt: skip
_AUXILIARY = ("scene", "appearance_style")
#: Weights, and what texts are read by. Not a hub's token, and not code, of which a second start reads the bytecode.
_READ = (".bin", ".ckpt", ".gz", ".json", ".model", ".pt", ".pth", ".safetensors", ".txt")


class VBench:
    """Package vbench: one of its dimensions, of each clip by itself, as its own total counts it.

    Args:
        device: where it computes.
        dimension: one of `DIMENSIONS`. `scene` and `appearance_style` read the prompt's `auxiliary_info`, of VBench's
            own list of prompts; `human_action` the words after "person is ".
        frames_per_second: of the files that are written for it, without a loss; some dimensions take frames by it.

    Raises:
        ValueError: another dimension.
    """

    def __init__(self, device: str, dimension: str, frames_per_second: int = 8) -> None:
        if dimension not in DIMENSIONS:
            raise ValueError(f"dimension {dimension!r}: its package can be asked for {', '.join(DIMENSIONS)}")
        import torch
        from vbench.utils import init_submodules

        self._dimension, self._rate, self._device = dimension, frames_per_second, torch.device(device)
        self._compute = getattr(importlib.import_module(f"vbench.{dimension}"), f"compute_{dimension}")
        # A dimension fetches and reads its networks when it is computed.
        blank = [Image.new("RGB", (256, 256))] * 16
        auxiliary = {"scene": {"scene": {"scene": "alley"}}, "appearance_style": {"appearance_style": "oil painting"}}

        def tried() -> Any:
            self._parts = init_submodules([dimension])[dimension]
            self([blank], ["A person is reading a book"], [{"auxiliary_info": auxiliary}])

        _, self.weight_files = _reading(tried)

    def __call__(self, pictures: list[Any], prompts: list[str], metadata: Rows) -> list[float]:
        """A score each; NaN where the package leaves a clip out."""
        with tempfile.TemporaryDirectory() as place:
            asked, clips = [], []
            for number, (clip, text, row) in enumerate(zip(pictures, prompts, metadata)):
                # One dimension reads the action that it looks for from the file's name; no other name is a prompt's.
                named = text.replace("/", " ").replace("\0", " ") if self._dimension == "human_action" else "clip"
                name = named.encode()[:200].decode(errors="ignore")
                clips.append(str(Path(place) / f"{name}-{number}.mp4"))
                _write_clip(clip, clips[-1], self._rate)
                one = {"prompt_en": text, "dimension": [self._dimension], "video_list": [clips[-1]]}
                if self._dimension in _AUXILIARY:
                    if self._dimension not in row.get("auxiliary_info", {}):
                        raise ValueError(f"{text[:80]!r} has no auxiliary_info of {self._dimension}, as VBench's have")
                    one["auxiliary_info"] = row["auxiliary_info"]
                asked.append(one)
            listed = Path(place) / "clips.json"
            listed.write_text(json.dumps(asked), encoding="utf-8")
            _, told = self._compute(str(listed), self._device, self._parts)
        # Of this one it divides the mean alone.
        scale = 100 if self._dimension == "imaging_quality" else 1
        each = {row["video_path"]: float(row["video_results"]) / scale for row in told}
        return [each.get(clip, math.nan) for clip in clips]


def _reading(work: Callable[[], Any]) -> tuple[Any, list[Path]]:
    """What `work` gives, and the files that Python opens in it to read, as far as they stay: not the system's, and not
    those of installed packages, which are told by their versions."""
    own = (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc", "/usr")
    elsewhere = tuple(f"{Path(folder).resolve()}{os.sep}" for folder in own)
    found: Dict[Path, None] = {}
    listens = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listens and event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[1] in ("r", "rb"):
            found[Path.cwd() / os.fsdecode(arguments[0])] = None

    sys.addaudithook(hook)
    try:
        given = work()
    finally:
        listens = False
    there = [path for path in found if path.suffix in _READ and path.is_file()]
    return given, sorted(path for path in there if not str(path.resolve()).startswith(elsewhere))


def _write_clip(frames: list[Any], path: str, rate: int) -> None:
    """H.264 in RGB at quality 0, which keeps every level."""
    from imageio_ffmpeg import get_ffmpeg_exe

    width, height = frames[0].size
    form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "-"]
    command = [get_ffmpeg_exe(), "-loglevel", "error", *form, "-c:v", "libx264rgb", "-qp", "0", path]
    subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames), check=True)
