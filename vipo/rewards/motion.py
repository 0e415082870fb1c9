"""How much moves in a clip, by optical flow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.config.reward_options import MotionOptions
from vipo.repeatable import RepeatableGradients
from vipo.rewards.flicker import need_clips, of_frames
from vipo.rewards.resident import Resident
from vipo.rewards.scored import Scored
from vipo.rewards.weights import DTYPES, fill, local_path, read_tensors

# The share of the pixels of a pair of frames that counts: what moves most.
_SHARE = 0.05
# Pixels of the shorter side on which flow is measured in VBench's threshold.
_SCALE = 256
# RAFT works on an eighth of both sides, and looks for matches on that and on three halves of it.
_MULTIPLE, _LEAST = 8, 128


class Motion:
    """Mean length of the 5 % largest flows of a pair of frames, mean over pairs, in 1/256 of the shorter side; >= 0.

    Pairs are neighbouring frames. VBench, which calls a pair moving from 6 on, takes frames an eighth of a second
    apart. Where: length of the flow at each frame.

    Source: VBench, arXiv 2311.17982, dynamic degree before its thresholds; RAFT (arXiv 2003.12039) is torchvision's.

    Args:
        device: where the network computes.
        options: section of the term.

    Raises:
        RewardError: there are no weights.
    """

    Options = MotionOptions

    def __init__(self, device: str, options: MotionOptions) -> None:
        self._file = local_path("path", options.path)
        self._batch, self._dtype = options.batch, options.dtype
        self.resident: Resident[Any] = Resident(self._load, device, options.resident)

    @property
    def weight_files(self) -> list[Path]:
        """What the network is read from."""
        return [self._file]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scored:
        """Scores ``(B,)`` and where ``(B, T, H, W)`` of clips ``(B, T, 3, H, W)`` in [0, 1]."""
        need_clips(images)
        batch, frames, _, height, width = images.shape
        first, second = (part.flatten(0, 1) for part in (images[:, :-1], images[:, 1:]))
        with self.resident as network:
            parts = zip(first.split(self._batch), second.split(self._batch), strict=True)
            flows = torch.cat([self._flow(network, *pair) for pair in parts])
        lengths = flows.norm(dim=1) * _SCALE / min(height, width)
        counted = max(1, int(_SHARE * height * width))
        scores = lengths.flatten(1).topk(counted, dim=1).values.mean(dim=1)
        return Scored(
            scores.view(batch, frames - 1).mean(dim=1), of_frames(lengths.view(batch, frames - 1, height, width))
        )

    def _flow(self, network: Any, first: Tensor, second: Tensor) -> Tensor:
        """Flow in pixels ``(B, 2, H, W)`` float32."""
        height, width = first.shape[2:]
        sides = [max(_LEAST, -(-side // _MULTIPLE) * _MULTIPLE) for side in (height, width)]
        over = (sides[1] - width, sides[0] - height)
        around = (over[0] // 2, over[0] - over[0] // 2, over[1] // 2, over[1] - over[1] // 2)
        padded = (F.pad(2 * frame - 1, around, mode="replicate").to(DTYPES[self._dtype]) for frame in (first, second))
        with torch.autocast(first.device.type, enabled=False), RepeatableGradients():
            flow: Tensor = network(*padded, num_flow_updates=20)[-1]
        return flow[..., around[2] : around[2] + height, around[0] : around[0] + width].float()

    def _load(self) -> Any:
        from torchvision.models.optical_flow import raft_large

        return fill(raft_large(weights=None), read_tensors([self._file]), self._file, self._dtype)
