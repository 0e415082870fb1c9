"""Samples and their allocation maps as inline pictures; of a video, some of its frames from top to bottom."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vipo.maps.show import overlay
from vipo.reporting.inputs import Experiment, ReportError, Run

#: Larger pictures are reduced to this longer side in pixels: the page carries all of them.
MAXIMUM_SIDE = 256
#: Frames shown of a video.
MAXIMUM_FRAMES = 4


@dataclass(frozen=True)
class Shown:
    """One arm's sample: picture and map over it as data URIs, and its trained rewards by column."""

    arm: str
    seed: int
    picture: str
    mapped: str
    rewards: dict[str, float]


@dataclass(frozen=True)
class ShownPrompt:
    """One prompt with every arm's sample of the same noise."""

    text: str
    sample: int
    samples: tuple[Shown, ...]


def shown_prompts(experiment: Experiment) -> list[ShownPrompt]:
    """The first held-out prompts of the evaluation, first sample, every arm's first seed: nothing is hand-picked.

    Raises:
        ReportError: a sample or its map is missing or unreadable.
    """
    scores = experiment.scores
    base = scores[scores["arm"] == "base"]
    chosen = base["prompt_id"].drop_duplicates().head(experiment.config.evaluation.shown_prompts)
    sample = int(base["sample"].min())
    firsts = [experiment.of_arm(arm)[0] for arm in experiment.arms]
    texts = base.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    return [
        ShownPrompt(str(texts[prompt]), sample, tuple(_shown(experiment, run, str(prompt), sample) for run in firsts))
        for prompt in chosen
    ]


def _shown(experiment: Experiment, run: Run, prompt: str, sample: int) -> Shown:
    table = experiment.scores
    mine = (table["run"] == run.name) & table["final"] & (table["prompt_id"] == prompt) & (table["sample"] == sample)
    if mine.sum() != 1:
        raise ReportError(f"{run.name}: no final sample {sample} of prompt {prompt} in its scores; evaluate it again")
    row = table[mine].iloc[0]
    name = f"u{row['update']}-{prompt}-{sample}"
    frames = _read_frames(experiment.folder / "samples" / run.name / "pictures" / f"{name}.png")
    heat, groups = _read_map(experiment.folder / "evaluation" / run.name / "maps.safetensors", name)
    if groups is None:
        frames, heats = frames[:1], heat[None]
    else:
        # Latent frames in equal steps from first to last, and of each the middle of the frames that it stands for.
        latent = np.linspace(0, len(groups) - 1, min(MAXIMUM_FRAMES, len(groups))).round().astype(int).tolist()
        frames = [frames[sum(groups[j]) // 2] for j in latent]
        heats = heat[latent]
    mapped = [overlay(image, part) for image, part in zip(frames, heats, strict=True)]
    rewards = {column: float(row[column]) for column in experiment.rewards}
    return Shown(run.config.arm, run.config.seed, _data_uri(frames), _data_uri(mapped), rewards)


def _read_frames(path: Path) -> list[Tensor]:
    try:
        with Image.open(path) as picture:
            frames = [np.array(frame.convert("RGB"), dtype=np.float32) for frame in ImageSequence.Iterator(picture)]
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error}); evaluate the run again") from error
    return [torch.from_numpy(pixels / 255).permute(2, 0, 1) for pixels in frames]


def _read_map(path: Path, name: str) -> tuple[Tensor, list[list[int]] | None]:
    """A sample's map, and of a video the frames ``[first, last + 1]`` that each latent frame stands for."""
    try:
        with safe_open(path, framework="pt") as file:
            spans = (file.metadata() or {}).get("frame_groups")
            return file.get_tensor(name), None if spans is None else json.loads(spans)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ReportError(f"{path}: map {name} cannot be read ({error}); evaluate the run again") from error


def _data_uri(frames: Sequence[Tensor]) -> str:
    pixels = (torch.cat(list(frames), dim=1).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((MAXIMUM_SIDE, MAXIMUM_SIDE * len(frames)), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
