"""Rewards by their authors' own packages, each in its own environment: what `serve.py` serves beside our rewrites.

``serve.py originals:HPSv2`` and so on; the folder of this file is on the path there. Each says which files its weights
are in. Where a package takes other things than Pillow pictures, its own form is made of them without a loss.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

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
        score, options = self._module.score, {"cp": self._checkpoint, "hps_version": self._version}
        return [float(score(p, text, **options)[0]) for p, text in zip(pictures, prompts)]


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
        self._model = package.load(checkpoint, device=device, med_config=med_config)
        self.weight_files = [checkpoint, med_config]

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
        from huggingface_hub import hf_hub_download

        checkpoint = checkpoint or hf_hub_download("MizzenAI/HPSv3", "HPSv3.safetensors")
        self._model = HPSv3RewardInferencer(checkpoint_path=checkpoint, device=device)
        self.weight_files = [checkpoint]

    def __call__(self, pictures: list[Any], prompts: list[str], metadata: Rows) -> list[float]:
        """A score each."""
        import torch

        with torch.no_grad():
            found = self._model.reward(image_paths=pictures, prompts=prompts)
        return [float(row[0]) for row in found]


class VBench:
    """Package vbench: one of its dimensions that take any prompt, of each clip by itself.

    Args:
        device: where it computes.
        dimension: such as subject_consistency, motion_smoothness or aesthetic_quality.
        frames_per_second: of the files that are written for it, without a loss.
    """

    def __init__(self, device: str, dimension: str, frames_per_second: int = 8) -> None:
        import torch
        from vbench import VBench as Package

        self._dimension, self._rate = dimension, frames_per_second
        self._folder = tempfile.TemporaryDirectory()
        self._package = Package(torch.device(device), "", self._folder.name)
        self.weight_files: list[str] = []

    def __call__(self, pictures: list[Any], prompts: list[str], metadata: Rows) -> list[float]:
        """A score each; NaN where the package leaves a clip out."""
        with tempfile.TemporaryDirectory() as place:
            texts = {}
            for number, (clip, text) in enumerate(zip(pictures, prompts)):
                _write_clip(clip, Path(place) / f"{number:06d}.mp4", self._rate)
                texts[f"{number:06d}.mp4"] = text
            self._package.evaluate(
                place, "clips", prompt_list=texts, dimension_list=[self._dimension], mode="custom_input"
            )
        told = json.loads((Path(self._folder.name) / "clips_eval_results.json").read_text())
        each = {Path(row["video_path"]).name: float(row["video_results"]) for row in told[self._dimension][1]}
        return [each.get(f"{number:06d}.mp4", math.nan) for number in range(len(pictures))]


def _write_clip(frames: list[Any], path: Path, rate: int) -> None:
    """H.264 in RGB at quality 0, which keeps every level."""
    from imageio_ffmpeg import get_ffmpeg_exe

    width, height = frames[0].size
    form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "-"]
    command = [get_ffmpeg_exe(), "-loglevel", "error", *form, "-c:v", "libx264rgb", "-qp", "0", str(path)]
    subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames), check=True)
