"""Pictures of allocation maps: the overlay, and the figure behind `vipo map`."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vipo.config.models import PerceptionConfig
from vipo.perception.allocator import AllocationMaps, resize
from vipo.perception.backbones import PerceptionError, load_backbone
from vipo.perception.structuring import PerceptualStructuring

COLORMAP = "inferno"
_OPACITY = 0.6
_LONGEST_SIDE = 1024
# Pixels per map cell, as in the latents of common generators, and the least cells a side.
_CELL = 8
_LEAST_CELLS = 16
_LARGEST_ASPECT = 8


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Blend a map in colour over the grey picture.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        heat: ``(h, w)``, >= 0; divided by its largest value where that exceeds 1, and resized to the picture.

    Returns:
        ``(3, H, W)`` float32 in [0, 1] on the CPU.

    Raises:
        ValueError: a shape is wrong.
    """
    if image.ndim != 3 or image.shape[0] != 3 or heat.ndim != 2:
        raise ValueError(
            f"image, heat: expected shapes (3, H, W) and (h, w), got {tuple(image.shape)} and {tuple(heat.shape)}"
        )
    from matplotlib import colormaps

    image, heat = image.detach().float().cpu(), heat.detach().float().cpu()
    height, width = image.shape[1:]
    strength = resize((heat / heat.amax().clamp(min=1))[None], (height, width))[0].clamp(0, 1)
    colour = torch.from_numpy(colormaps[COLORMAP](strength.numpy())[..., :3]).float().permute(2, 0, 1)
    grey = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=0)
    return ((1 - _OPACITY) * grey + _OPACITY * colour).clamp(0, 1)


def map_images(paths: Sequence[Path], output: Path, config: PerceptionConfig, device: str = "cpu") -> list[Path]:
    """Draw the allocation map of each picture: picture, map and overlay side by side, as PNG.

    Args:
        paths: pictures in any format that Pillow reads, of any size and mode.
        output: a ``.png`` file for one picture, or a folder that receives ``<stem>.png`` for each.
        config: section `perception`.
        device: where the backbone runs.

    Returns:
        The files written, in the order of `paths`.

    Raises:
        PerceptionError: a picture is missing, unreadable or extremely elongated, two pictures or a picture and its
            own map share a name, the output cannot be written (all before any model is loaded, but for a full
            disk), or the backbone cannot be used.
    """
    targets = _targets(paths, output)
    for path in paths:
        read_image(path)
    folder = targets[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PerceptionError(f"{folder}: cannot be made ({error}); choose another output") from error
    if not os.access(folder, os.W_OK):
        raise PerceptionError(f"{folder}: is not writable; choose another output")
    structuring = PerceptualStructuring(load_backbone(config, device), config)
    for path, target in zip(paths, targets, strict=True):
        image = read_image(path)
        height, width = image.shape[1:]
        structuring.preflight((height, width))
        size = (max(_LEAST_CELLS, height // _CELL), max(_LEAST_CELLS, width // _CELL))
        found = structuring(image[None].to(device), size)
        found.check()
        _draw(image, found, structuring, target)
    return targets


def _targets(paths: Sequence[Path], output: Path) -> list[Path]:
    if not paths:
        raise PerceptionError("no picture given")
    as_file = output.suffix.lower() == ".png" and not output.is_dir()
    if as_file and len(paths) > 1:
        raise PerceptionError(f"{output}: one file cannot take {len(paths)} maps; give a folder")
    if not as_file and output.is_file():
        raise PerceptionError(f"{output}: is a file that does not end in .png; give a .png file or a folder")
    targets = [output] if as_file else [output / f"{path.stem}.png" for path in paths]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            other = paths[targets.index(target)]
            raise PerceptionError(f"{paths[index]} and {other} would both become {target}; map them separately")
        if target.resolve() in {path.resolve() for path in paths}:
            raise PerceptionError(f"{target}: would overwrite a picture; choose another output")
    return targets


def read_image(path: Path) -> Tensor:
    """A picture as ``(3, H, W)`` float32 in [0, 1]: upright (EXIF), transparency over white, any bit depth.

    Raises:
        PerceptionError: the file is missing or no picture, holds values outside the range of its mode, or is more
            than eight times as long as wide.
    """
    try:
        # Pillow warns of very large pictures before it refuses the largest; the refusal is enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened)
                pixels = _pixels(picture)
    except FileNotFoundError:
        raise PerceptionError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise PerceptionError(f"{path}: cannot be read as a picture ({error})") from error
    height, width = pixels.shape[:2]
    if max(height, width) > _LARGEST_ASPECT * min(height, width):
        raise PerceptionError(
            f"{path}: {width}x{height} pixels; the longer side may be {_LARGEST_ASPECT} times the shorter, crop it"
        )
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _pixels(picture: Image.Image) -> np.ndarray:
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
    colours = np.asarray(picture.convert("RGBA")).astype(np.float32) / 255
    alpha = colours[..., 3:]
    return colours[..., :3] * alpha + (1 - alpha)


def _draw(image: Tensor, found: AllocationMaps, structuring: PerceptualStructuring, target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shrink = min(1.0, _LONGEST_SIDE / max(image.shape[1:]))
    height, width = (max(1, round(side * shrink)) for side in image.shape[1:])
    image = F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]
    heat = found.maps[0].cpu()
    panel = 4.2
    aspect = height / width
    breadth, length = (panel, panel * aspect) if aspect <= 1 else (panel / aspect, panel)
    figure = Figure(figsize=(3 * breadth + 1.5, length + 0.95), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    # Nearest keeps small pictures crisp; larger ones have no visible pixels.
    style = {"interpolation": "nearest" if max(height, width) <= 256 else "antialiased"}
    axes[0].imshow(image.permute(1, 2, 0).numpy(), **style)
    highest = max(1.0, float(heat.max()))
    shown = axes[1].imshow(heat.numpy(), cmap=COLORMAP, vmin=0, vmax=highest, extent=(0, width, height, 0))
    axes[2].imshow(overlay(image, heat).permute(1, 2, 0).numpy(), **style)
    titles = ("picture", "no structure: uniform map" if bool(found.constant[0]) else "allocation map", "overlay")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    bar = figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.015, aspect=22)
    bar.set_label("weight of the advantage", fontsize=8)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    config = structuring.config
    note = (
        f"{config.backbone} · {config.components} components · {config.aggregation} · "
        f"smoothing {config.smoothing:g} · orientation {structuring.orientation}"
    )
    figure.supxlabel(note, fontsize=7, color="0.4", parse_math=False)
    partial = target.with_name(f".{target.name}.partial")
    try:
        figure.savefig(partial, format="png", metadata={"Software": None})
        partial.replace(target)
    except OSError as error:
        raise PerceptionError(
            f"{target}: cannot be written ({error}); free disk space or choose another output"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
