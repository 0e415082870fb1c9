"""Pictures, animations and films as tensors: Pillow reads the first two, PyAV the third."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from vipo.perception.errors import PerceptionError
from vipo.regular import open_regular

# FFmpeg's demuxer by suffix: left to guess, it would follow a playlist's references to other files.
_FILMS: Mapping[str, str] = MappingProxyType(
    {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}
)
# Pillow also calls the pages of a TIFF and the lenses of a camera's MPO frames.
_ANIMATED = frozenset({"GIF", "WEBP", "PNG", "AVIF"})
_LARGEST_ASPECT = 8
_MOST_PIXELS = 2**25
_MOST_CLIP_PIXELS = 2**27
_MOST_FRAMES = 10_000
_MOST_BYTES = 2**30
_DEFAULT_MILLISECONDS = 100.0
_CELL = 8
_LEAST_CELLS = 16


@dataclass(frozen=True)
class Clip:
    """A picture (one frame) or a clip.

    Attributes:
        frames: ``(T, 3, H, W)`` float32 in [0, 1].
        milliseconds: how long each frame is shown; empty for a picture.
    """

    frames: Tensor
    milliseconds: tuple[float, ...] = ()


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` name, folders replaced by the pictures and films directly in them, by name.

    Raises:
        PerceptionError: nothing is given, a path holds a NUL character, or a folder holds no picture.
    """
    Image.init()
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} | set(_FILMS)
    found: list[Path] = []
    for path in paths:
        if "\0" in str(path):
            raise PerceptionError(f"{str(path)!r}: holds a NUL character, which no path can")
        if path.is_dir():
            inside = sorted(item for item in path.iterdir() if item.suffix.lower() in readable and item.is_file())
            visible = [item for item in inside if not item.name.startswith(".")]
            if not visible:
                raise PerceptionError(f"{path}: no picture or film in this folder; name the files")
            found += visible
        else:
            found.append(path)
    if not found:
        raise PerceptionError("no picture given")
    return found


def read_image(path: Path) -> Tensor:
    """A picture as ``(3, H, W)`` float32 in [0, 1], of a clip the first frame; see `read_clip`."""
    return read_clip(path, most_frames=1).frames[0]


def read_clip(path: Path, most_frames: int | None = None) -> Clip:
    """Read a picture, an animation (GIF, WebP, APNG, AVIF) or a film (MP4, MOV, Matroska, WebM, AVI).

    Pictures come upright (EXIF), with transparency over white, in any bit depth. Pages of a TIFF are no frames: the
    first is read.

    Args:
        path: the file; the suffix tells films from pictures.
        most_frames: stop after so many frames.

    Raises:
        PerceptionError: the file is missing, no regular file, larger than 1 GiB or cannot be decoded, holds values
            outside the range of its mode, is more than eight times as long as wide, has more than 2**25 pixels (an 8K
            frame has fewer), or is a clip of more than 2**27 pixels or 10,000 frames.
    """
    frames: list[NDArray[np.float32]] = []
    milliseconds: list[float] = []
    try:
        for pixels, duration in _film(path) if path.suffix.lower() in _FILMS else _pictures(path):
            height, width = pixels.shape[:2]
            if len(frames) == _MOST_FRAMES:
                raise PerceptionError(f"{path}: more than {_MOST_FRAMES} frames; make the clip shorter")
            if max(height, width) > _LARGEST_ASPECT * min(height, width):
                raise PerceptionError(
                    f"{path}: {width}x{height} pixels; the longer side may be {_LARGEST_ASPECT} times the shorter, "
                    "crop it"
                )
            if frames and (len(frames) + 1) * height * width > _MOST_CLIP_PIXELS:
                raise PerceptionError(
                    f"{path}: more than {_MOST_CLIP_PIXELS // (height * width)} frames of {width}x{height} pixels; "
                    "make the clip shorter or smaller"
                )
            frames.append(pixels)
            milliseconds.append(duration)
            if len(frames) == most_frames:
                break
        if not frames:
            raise ValueError("it has no frame")
        # One by one, so that a frame is not there a second and third time.
        stacked = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames])
    except FileNotFoundError:
        raise PerceptionError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise PerceptionError(f"{path}: cannot be read as a picture ({error})") from error
    return Clip(stacked, tuple(milliseconds) if len(frames) > 1 else ())


def _pictures(path: Path) -> Iterator[tuple[NDArray[np.float32], float]]:
    # Pillow warns of very large pictures before it refuses the largest; the refusal is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with open_regular(path, _MOST_BYTES) as stream, Image.open(stream) as opened:
            _check_size(*opened.size)
            animated = opened.format in _ANIMATED and getattr(opened, "is_animated", False)
            for frame in ImageSequence.Iterator(opened) if animated else (opened,):
                yield _pixels(ImageOps.exif_transpose(frame)), frame.info.get("duration") or _DEFAULT_MILLISECONDS


def _check_size(width: int, height: int) -> None:
    """Before anything is decoded."""
    if width * height > _MOST_PIXELS:
        raise ValueError(
            f"{width}x{height} pixels, at most {_MOST_PIXELS} are read, such as 5792x5792; make it smaller"
        )


def _film(path: Path) -> Iterator[tuple[NDArray[np.float32], float]]:
    import av

    try:
        # An open file instead of a name: FFmpeg would read some names as protocols.
        with (
            open_regular(path, _MOST_BYTES) as stream,
            av.open(stream, "r", format=_FILMS[path.suffix.lower()]) as container,
        ):
            for video in container.streams.video[:1]:
                _check_size(video.width, video.height)
                duration = 1000 / float(video.average_rate) if video.average_rate else _DEFAULT_MILLISECONDS
                for frame in container.decode(video):
                    _check_size(frame.width, frame.height)
                    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    yield pixels.astype(np.float32) / np.float32(255), duration
    except av.FFmpegError as error:
        raise ValueError(error.strerror) from error


def _pixels(picture: Image.Image) -> NDArray[np.float32]:
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.float32)
        # Pillow's modes I and I;16 hold 16-bit greyscale; its own conversion to RGB clips them at 255.
        grey = values if picture.mode == "F" else values / 65535
        if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1):
            raise ValueError(
                f"values from {values.min():g} to {values.max():g} in mode {picture.mode}: "
                "expected 0..65535 for integers, 0..1 for floating point"
            )
        return np.repeat(grey[..., None], 3, axis=2)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("RGB")).astype(np.float32) / np.float32(255)
    colours = np.asarray(picture.convert("RGBA")).astype(np.float32)
    # In place: a large picture is not there several times.
    colours /= np.float32(255)
    over, alpha = colours[..., :3], colours[..., 3:]
    over *= alpha
    over += 1 - alpha
    return over


def map_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the map that is shown or scored for a picture: one cell for 8 pixels, at least 16 a side.

    8 is the spatial factor of common generators' latents.
    """
    return max(_LEAST_CELLS, height // _CELL), max(_LEAST_CELLS, width // _CELL)
