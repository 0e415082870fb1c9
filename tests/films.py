"""A small film, as a camera's file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def moving(count: int = 4, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A red square that moves to the right, ``(count, height, width, 3)``."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for index in range(count):
        frames[index, 12:36, 8 + 8 * index : 32 + 8 * index] = (230, 40, 40)
    return frames


def write_film(path: Path, frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> None:
    """Frames ``(H, W, 3)`` as MPEG-4, eight a second, in what the file's name says."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
