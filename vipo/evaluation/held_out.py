"""What is drawn of the held-out prompts, and the files that hold it."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from vipo.config.run import Config
from vipo.errors import VipoError
from vipo.prompts import Prompt, read_prompts
from vipo.prompts.needs import evaluated

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Beside the pictures: what they are, for whoever reads them without the generator.
FACTS = "samples.json"


def check_facts(facts: Any) -> None:
    """Check what samples say of themselves in `FACTS`: updates, latent grid, the frames of each latent frame.

    Raises:
        ValueError, LookupError, TypeError: they do not.
    """
    updates, grid, groups = (facts[name] for name in ("updates", "grid", "frame_groups"))
    lists = [updates, grid, *([] if groups is None else groups)]
    if not all(isinstance(own, list) and own and all(type(value) is int for value in own) for own in lists):
        raise ValueError("its updates, grid or frame_groups are no lists of whole numbers")
    if len(grid) not in (2, 3) or any(len(group) != 2 for group in groups or ()):
        raise ValueError("its grid or frame_groups are of another length")


def samples_folder(experiment: Path, run: str) -> Path:
    """Where a run's samples are: `FACTS`, and in ``pictures/`` a PNG for every sample of every update."""
    return experiment / "samples" / run


class EvaluationError(VipoError):
    """Evaluation cannot start; the message names the missing input."""


@dataclass(frozen=True)
class HeldOut:
    """One sample that every arm draws: a prompt and a sample number, which key its noise."""

    prompt: Prompt
    number: int

    @property
    def name(self) -> str:
        """File-safe name within an update: prompt ids are hexadecimal."""
        return f"{self.prompt.id}-{self.number}"


def held_out_samples(prompts: Sequence[Prompt], config: Config) -> list[HeldOut]:
    """The samples of the evaluation, prompt by prompt, the same for every arm and seed."""
    numbers = range(config.evaluation.samples_per_prompt)
    return [HeldOut(prompt, number) for prompt in evaluated(prompts, config) for number in numbers]


def held_out_batches(prompts: Path, config: Config) -> list[list[HeldOut]]:
    """`held_out_samples` of prepared prompts in batches of ``evaluation.batch``: the unit of sampling and of scoring.

    Raises:
        EvaluationError: no prompt is held out.
        PromptError: the file is missing or damaged.
    """
    samples = held_out_samples(read_prompts(prompts), config)
    if not samples:
        raise EvaluationError(f"{prompts}: no prompt is held out; raise prompts.eval_share")
    batch = config.evaluation.batch
    return [samples[start : start + batch] for start in range(0, len(samples), batch)]


def sample_name(update: int, sample: HeldOut) -> str:
    """Of a picture's file and map, without the suffix."""
    return f"u{update}-{sample.name}"


def save_sample(image: Tensor, path: Path, frame_rate: int | None = None) -> None:
    """Write a picture ``(3, H, W)`` as PNG, or a video ``(T, 3, H, W)`` as animated PNG with every frame.

    Args:
        image: in [0, 1]; rounded to multiples of 1/255.
        path: of the file, whatever its suffix.
        frame_rate: of a video, frames per second.
    """
    pixels = (image * 255).round().to(torch.uint8).movedim(-3, -1).numpy()
    if image.ndim == 3:
        Image.fromarray(pixels).save(path, format="PNG")
        return
    first, *others = (Image.fromarray(frame) for frame in pixels)
    # Pillow merges equal neighbours of equal blending into one long frame. Over and source are the same without
    # transparency, so that alternating them keeps every frame.
    blend = [number % 2 for number in range(len(pixels))]
    duration = 1000 / (frame_rate or 1)
    first.save(
        path, format="PNG", save_all=True, append_images=others, duration=[duration] * len(pixels), blend=blend, loop=0
    )


def check_sample(path: Path) -> None:
    """Check the picture or video of a file that `save_sample` wrote by the checksums that PNG has.

    Raises:
        ValueError: it is cut off, or a bit of it has changed.
    """
    content, place, name = path.read_bytes(), len(_SIGNATURE), b""
    while content.startswith(_SIGNATURE) and place < len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4])
        name = content[place + 4 : place + 8]
        if content[end : end + 4] != zlib.crc32(content[place + 4 : end]).to_bytes(4):
            raise ValueError("it does not hold what was written")
        place = end + 4
    if name != b"IEND":
        raise ValueError("its end is missing")


def read_samples(folder: Path, update: int, samples: Sequence[HeldOut], *, video: bool) -> Tensor:
    """Pictures ``(N, 3, H, W)`` or videos ``(N, T, 3, H, W)`` in [0, 1] that `save_sample` wrote.

    Raises:
        EvaluationError: a file is missing or damaged.
    """
    found = []
    for sample in samples:
        path = folder / f"{sample_name(update, sample)}.png"
        try:
            with Image.open(path) as file:
                frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise EvaluationError(
                f"{path}: cannot be read ({error}); run 'vipo evaluate --only sample' again"
            ) from error
        found.append(torch.from_numpy(np.stack(frames) if video else frames[0]).movedim(-1, -3).float() / 255)
    if len({image.shape for image in found}) > 1:
        raise EvaluationError(
            f"{folder}: samples of update {update} differ in size; run 'vipo evaluate --only sample' again"
        )
    return torch.stack(found)
