"""Videos for the page: WebM from frames, small and the same bytes for the same frames."""

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

_MINIMUM_SIDE = 128


def encode_film(frames: Sequence[NDArray[np.uint8]], rate: float) -> bytes:
    """A silent WebM (VP9).

    Args:
        frames: ``(H, W, 3)`` each.
        rate: frames a second.
    """
    import av

    height, width = frames[0].shape[:2]
    # Whole pixels stay whole, and the codec's colour planes need even sides.
    factor = max(1, -(-_MINIMUM_SIDE // max(height, width)))
    factor += factor % 2 * (height % 2 or width % 2)
    stream = io.BytesIO()
    # Without the flag the file gets a random identity.
    with av.open(stream, mode="w", format="webm", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libvpx-vp9", rate=Fraction(rate).limit_denominator(1000))
        video.width, video.height, video.pix_fmt = width * factor, height * factor, "yuv420p"
        video.options = {"crf": "20", "b:v": "0", "threads": "1", "deadline": "good", "cpu-used": "4"}
        video.codec_context.thread_count = 1
        for pixels in frames:
            enlarged = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
            for packet in video.encode(av.VideoFrame.from_ndarray(enlarged, format="rgb24")):
                container.mux(packet)
        for packet in video.encode():
            container.mux(packet)
    return stream.getvalue()
