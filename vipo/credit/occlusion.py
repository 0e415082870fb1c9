"""Where a reward looks, for rewards without a gradient: by how much it changes where a patch is blurred."""

from collections.abc import Callable

import torch
from torch import Tensor


def occlusion_map(reward: Callable[[Tensor], Tensor], pictures: Tensor, patches: int) -> Tensor:
    """``|r(x) - r(x with the patch blurred)|`` of each patch, ``(B, patches, patches)`` float64.

    A patch shows the sample's own content blurred: by a Gaussian whose standard deviation is half the patch's longer
    side, cut off at two of them. So colours stay about what they are, and what the patch shows is gone. Of a video the
    patch is blurred in all frames alike.

    Args:
        reward: of pictures like `pictures`, ``(B,)``; called once for them and once a patch.
        pictures: ``(B, [frames,] 3, height, width)`` in [0, 1].
        patches: a side.

    Raises:
        ValueError: the pictures have fewer pixels a side.

    Source: occlusion sensitivity (Zeiler and Fergus, arXiv 1311.2901), with blur in place of grey.
    """
    height, width = pictures.shape[-2:]
    if patches > min(height, width):
        raise ValueError(f"patches: {patches} a side of pictures of {height} x {width} pixels")
    rows, columns = (torch.linspace(0, side, patches + 1).round().int().tolist() for side in (height, width))
    spread = max(height, width) / patches / 2
    blurred = blur(pictures, spread)
    before = reward(pictures).double()
    found = torch.zeros(len(pictures), patches, patches, dtype=torch.float64, device=pictures.device)
    for y in range(patches):
        for x in range(patches):
            place = (..., slice(rows[y], rows[y + 1]), slice(columns[x], columns[x + 1]))
            occluded = pictures.clone()
            occluded[place] = blurred[place]
            found[:, y, x] = (reward(occluded).double() - before).abs().to(pictures.device)
    return found


def blur(pictures: Tensor, spread: float) -> Tensor:
    """Gaussian blur ``(..., 3, height, width)`` of a standard deviation in pixels, cut off at two of them, or at the
    picture's size."""
    # Its import takes as long as torch's own, and few who import this file blur anything.
    from torchvision.transforms.functional import gaussian_blur

    flat = pictures.flatten(0, -4)
    sides = [2 * min(round(2 * spread), side - 1) + 1 for side in (flat.shape[-1], flat.shape[-2])]
    return gaussian_blur(flat, sides, [spread, spread]).reshape(pictures.shape)
