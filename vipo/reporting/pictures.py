"""Samples and their allocation maps as inline pictures."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vipo.perception.show import overlay
from vipo.reporting.inputs import Experiment, ReportError, Run

#: Larger pictures are reduced to this longer side in pixels: the page carries all of them.
MAXIMUM_SIDE = 256


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
    folder = experiment.folder / "evaluation" / run.name
    name = f"u{row['update']}-{prompt}-{sample}"
    image = _read_picture(folder / "samples" / f"{name}.png")
    mapped = overlay(image, _read_map(folder / "maps.safetensors", name))
    rewards = {column: float(row[column]) for column in experiment.rewards}
    return Shown(run.config.arm, run.config.seed, _data_uri(image), _data_uri(mapped), rewards)


def _read_picture(path: Path) -> Tensor:
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error}); evaluate the run again") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _read_map(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ReportError(f"{path}: map {name} cannot be read ({error}); evaluate the run again") from error


def _data_uri(image: Tensor) -> str:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((MAXIMUM_SIDE, MAXIMUM_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
