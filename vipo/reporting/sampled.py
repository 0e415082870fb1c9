"""Held-out samples and their maps as an evaluation left them: where they are, and how they are read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from safetensors import SafetensorError, safe_open

from vipo.reporting.inputs import ReportError


def sample_file(folder: Path, run: str, update: int, prompt_id: str, sample: int) -> Path:
    """Where an evaluation wrote a sample: a PNG, of a video an animated one.

    Args:
        folder: ``results/<experiment>``.
    """
    return folder / "samples" / run / "pictures" / f"u{update}-{prompt_id}-{sample}.png"


def read_frames(path: Path) -> tuple[list[NDArray[np.uint8]], float]:
    """The frames ``(H, W, 3)`` of a sample, one of a picture, and a video's frames a second.

    Raises:
        ReportError: the file is missing or is no picture.
    """
    try:
        with Image.open(path) as picture:
            frames = [np.array(frame.convert("RGB"), dtype=np.uint8) for frame in ImageSequence.Iterator(picture)]
            milliseconds = float(picture.info.get("duration") or 0)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ReportError(f"{path}: cannot be read ({error}); evaluate the run again") from error
    return frames, 1000 / milliseconds if milliseconds else 8.0


class Maps:
    """The allocation maps of a run's final samples, read one by one.

    Attributes:
        groups: of videos, the frames ``[first, last + 1]`` that each latent frame stands for.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """`folder`: ``results/<experiment>``.

        Raises:
            ReportError: the run's maps are missing or damaged.
        """
        self._path = folder / "evaluation" / run / "maps.safetensors"
        self.groups: list[list[int]] | None = None
        try:
            file: Any = safe_open(self._path, framework="np")
            self._file = file
            spans = (file.metadata() or {}).get("frame_groups")
            self.groups = None if spans is None else json.loads(spans)
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise ReportError(f"{self._path}: cannot be read ({error}); evaluate the run again") from error

    def read(self, update: int, prompt_id: str, sample: int) -> NDArray[np.float32]:
        """``(h, w)``, of a video ``(T_lat, h, w)``.

        Raises:
            ReportError: there is no such map.
        """
        name = f"u{update}-{prompt_id}-{sample}"
        try:
            return np.asarray(self._file.get_tensor(name), dtype=np.float32)
        except (OSError, SafetensorError, ValueError) as error:
            raise ReportError(f"{self._path}: map {name} cannot be read ({error}); evaluate the run again") from error
