"""OCR: whether a picture shows the text that it was asked to show, and where it shows any."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vipo.config.reward_options import OcrOptions
from vipo.prompts.needs import drawn_text
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import eight_bit, need_pictures
from vipo.rewards.scored import Scored


class Ocr:
    """``1 - min(d, L) / L``: L letters wanted, d edits (Levenshtein) from what is read to them; [0, 1].

    Blanks and letter case do not count, and d is 0 where the wanted text is part of what is read. Lines are read in the
    order in which they are found, from top to bottom. Where: 1 in the boxes of the lines that were read, else 0.

    PaddleOCR's networks in the package rapidocr, on one thread of the CPU whatever the device; nothing is fetched.

    Source: the OCR reward of Flow-GRPO, arXiv 2505.05470, which reads with an earlier PaddleOCR.

    Args:
        device: not read.
        options: section of the term.
    """

    Options = OcrOptions

    def __init__(self, device: str, options: OcrOptions) -> None:
        from rapidocr import RapidOCR

        self._key = options.key
        self._read = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": options.confidence,
                "Det.limit_side_len": options.side,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scored:
        """Scores ``(B,)`` and where ``(B, H, W)`` of pictures ``(B, 3, H, W)`` in [0, 1].

        Raises:
            RewardError: a prompt does not say what is to be read.
        """
        need_pictures(images)
        wanted = []
        for number, (prompt, row) in enumerate(zip(prompts, metadata, strict=True)):
            text = drawn_text(prompt, row, self._key)
            if text is None:
                raise RewardError(
                    f"sample {number}: no text to be read: metadata has no {self._key!r}, and {prompt[:80]!r} holds "
                    'nothing in "'
                )
            wanted.append(letters(text))
        levels = eight_bit(images)
        found = [self._lines(picture) for picture in levels]
        read = ["".join(text for text, _ in lines) for lines in found]
        scores = [closeness(text, want) for text, want in zip(read, wanted, strict=True)]
        where = np.stack([covered(levels.shape[1:3], [box for _, box in lines]) for lines in found])
        return Scored(torch.tensor(scores), torch.from_numpy(where))

    def _lines(self, picture: np.ndarray[Any, Any]) -> list[tuple[str, Any]]:
        # It takes colours as OpenCV has them.
        result = self._read(np.ascontiguousarray(picture[:, :, ::-1]))
        texts, boxes = getattr(result, "txts", None), getattr(result, "boxes", None)
        return [] if texts is None or boxes is None else list(zip(texts, boxes, strict=True))


def letters(text: str) -> str:
    """What counts of a text: without blanks, in lower case."""
    return "".join(text.split()).lower()


def closeness(read: str, wanted: str) -> float:
    """The score of one picture, of what is read in it and of a text as `letters` gives it."""
    read = letters(read)
    edits = 0 if wanted in read else levenshtein(read, wanted)
    return 1 - min(edits, len(wanted)) / len(wanted)


def levenshtein(first: str, second: str) -> int:
    """Least number of letters to insert, delete or replace that makes one text of the other."""
    row = list(range(len(second) + 1))
    for i, own in enumerate(first, start=1):
        before, row = row, [i]
        for j, other in enumerate(second, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (own != other)))
    return row[-1]


def covered(shape: Sequence[int], boxes: Sequence[Any]) -> np.ndarray[Any, Any]:
    """1 inside any of the boxes (corners ``(4, 2)``, x before y), else 0: ``(H, W)`` float32."""
    mask = Image.new("L", (shape[1], shape[0]))
    for box in boxes:
        ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in box], fill=1)
    return np.asarray(mask, dtype=np.float32)
