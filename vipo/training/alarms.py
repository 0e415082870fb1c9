"""Signs of reward hacking in an update's pictures, and the bounds that stop a run.

Rewards can be raised by what nobody wants: pictures that are dark, blown out, flat, garish or all alike. The signs are
measured of every update, whatever is rewarded; those of update 1 are the base generator's.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.config.alarms import SIGNS, AlarmConfig
from vipo.errors import VipoError
from vipo.text import listed
from vipo.training.errors import TrainingError

# Larger pictures are averaged down, so that a sign costs the same at any size and means about the same.
_SIDE, _THUMBNAIL = 256, 16
# Values of the pictures whose signs are taken together.
_TOGETHER = 2**18
_DARK, _BRIGHT, _EDGE, _LEVELS = 0.05, 0.95, 0.1, 4
_LUMA = (0.299, 0.587, 0.114)


class AlarmRaised(VipoError):
    """A bound of section `alarms` is broken: the run stopped, and its checkpoint holds every finished update."""


def picture_signs(pictures: Tensor) -> Tensor:
    """Of each sample, the values of `SIGNS`.

    The shares of pixels whose luma (Rec. 601) is below 0.05 and above 0.95, and of those at which it differs from the
    pixel to the right or below by more than 0.1; the entropy of the colours' histogram over 4 x 4 x 4 cells, in bits,
    [0, 6]; the mean saturation ``(max - min) / max`` over channels, [0, 1]. Of a clip over all of its frames.

    Args:
        pictures: ``(n, 3, H, W)`` or ``(n, T, 3, H, W)`` in [0, 1]; what is not finite counts as black.

    Returns:
        ``(n, 5)`` float64 on the CPU: the same on any device but for the averaging of large pictures.
    """
    small = _small(pictures, _SIDE)
    # Several at a time, of small pictures: what is done with each is little beside the call that does it.
    together = max(1, _TOGETHER // small[0].numel())
    return torch.cat([_signs(part) for part in small.split(together)])


def _signs(clips: Tensor) -> Tensor:
    """`picture_signs` of ``(n, T, 3, h, w)`` float64; sums that are not of whole numbers are taken a sample at a time,
    whose bits then do not depend on its neighbours."""
    luma = (clips * torch.tensor(_LUMA, dtype=clips.dtype).view(1, 1, 3, 1, 1)).sum(dim=2)
    across = (luma[..., :-1, 1:] - luma[..., :-1, :-1]).abs()
    down = (luma[..., 1:, :-1] - luma[..., :-1, :-1]).abs()
    cells = (clips * _LEVELS).long().clamp(max=_LEVELS - 1)
    index = ((cells[:, :, 0] * _LEVELS + cells[:, :, 1]) * _LEVELS + cells[:, :, 2]).flatten(1)
    colours = _LEVELS**3
    index += colours * torch.arange(len(clips))[:, None]
    counts = torch.bincount(index.flatten(), minlength=colours * len(clips)).view(-1, colours)
    share = counts.double() / index.shape[1]
    largest, smallest = clips.amax(dim=2), clips.amin(dim=2)
    saturation = torch.where(largest > 0, (largest - smallest) / largest.clamp(min=1e-12), 0.0)
    values = (
        *((found.flatten(1).double().mean(dim=1)) for found in (luma < _DARK, luma > _BRIGHT)),
        (torch.maximum(across, down) > _EDGE).flatten(1).double().mean(dim=1),
        torch.stack([row.sum() for row in torch.special.entr(share)]) / torch.log(torch.tensor(2.0, dtype=share.dtype)),
        torch.stack([row.mean() for row in saturation]),
    )
    return torch.stack(values, dim=1)


def thumbnails(pictures: Tensor) -> Tensor:
    """Each sample averaged to at most 16 x 16, of a clip its mean over frames: ``(n, 3 * h * w)`` float64, CPU."""
    return _small(pictures, _THUMBNAIL).mean(dim=1).flatten(1)


def group_diversity(values: Tensor, groups: Tensor) -> float:
    """Mean over groups of the mean root mean square difference of two samples of a group.

    Args:
        values: ``(N, d)``.
        groups: ``(N,)``, which group a sample is of; each has two samples or more.
    """
    found = []
    for group in groups.unique():
        own = values[groups == group]
        pairs = torch.pdist(own) / own.shape[1] ** 0.5
        found.append(pairs.mean())
    return float(torch.stack(found).mean())


def alarm_metrics(signs: Tensor, thumbs: Tensor, groups: Tensor) -> dict[str, float]:
    """What is logged of all samples of an update; see `picture_signs`, `thumbnails` and `group_diversity`."""
    means = dict(zip(SIGNS, signs.mean(dim=0).tolist(), strict=True))
    return {f"alarm/{name}": value for name, value in means.items()} | {
        "alarm/group_diversity": group_diversity(thumbs, groups)
    }


class Alarms:
    """The bounds of a run, and for how long each has been broken.

    Args:
        bounds: section `alarms.stop`.
        history: metrics of the updates before, in order.
    """

    def __init__(self, bounds: Sequence[AlarmConfig], history: Iterable[Mapping[str, float]] = ()) -> None:
        self._bounds = bounds
        self._broken = [0] * len(bounds)
        self._first: Mapping[str, float] | None = None
        for metrics in history:
            self.see(metrics)

    def see(self, metrics: Mapping[str, float]) -> None:
        """Take note of the next update's metrics.

        Raises:
            TrainingError: there is no such metric; the message lists those that there are.
        """
        first = self._first = metrics if self._first is None else self._first
        for place, bound in enumerate(self._bounds):
            if bound.metric not in metrics:
                names = listed(sorted(name for name in metrics if name != "update"), 60)
                raise TrainingError(f"alarms.stop: there is no metric {bound.metric!r}; choose one of {names}")
            value = metrics[bound.metric] - (first[bound.metric] if bound.against_first else 0.0)
            # What is not a number is in no bounds.
            inside = (bound.above is None or value <= bound.above) and (bound.below is None or value >= bound.below)
            self._broken[place] = 0 if inside else self._broken[place] + 1
        self._last = metrics

    def check(self) -> None:
        """Stop the run if a bound is broken.

        Raises:
            AlarmRaised: one is.
        """
        for bound, count in zip(self._bounds, self._broken, strict=True):
            if count >= bound.updates:
                sides = {"above": bound.above, "below": bound.below}
                told = " or ".join(f"{name} {side:g}" for name, side in sides.items() if side is not None)
                against = " (against update 1)" if bound.against_first else ""
                value, update = self._last[bound.metric], int(self._last["update"])
                raise AlarmRaised(
                    f"stopped by its own bound: {bound.metric} is {value:.6g} after update {update}, and alarms.stop "
                    f"says {told}{against}, for {count} in a row. The checkpoint holds every finished update: the same "
                    "command with a wider bound goes on from there"
                )


def _small(pictures: Tensor, side: int) -> Tensor:
    """``(n, T, 3, h, w)`` float64 on the CPU, no side longer than `side`; fetched from the device at once."""
    frames = pictures.reshape(-1, *pictures.shape[-3:])
    height, width = (min(side, length) for length in frames.shape[2:])
    frames = frames.nan_to_num(0.0).clamp(0, 1).float()
    if (height, width) != tuple(frames.shape[2:]):
        frames = F.adaptive_avg_pool2d(frames, (height, width))
    return frames.cpu().double().reshape(len(pictures), -1, 3, height, width)
