"""Pictures of allocation maps: the overlay, and the figures behind `vipo map`."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vipo.config.perception import PerceptionConfig
from vipo.maps.pictures import Clip, find_pictures, map_size, read_clip
from vipo.perception.allocator import minmax, resize
from vipo.perception.backbones import load_backbone
from vipo.perception.components import principal_components
from vipo.perception.errors import PerceptionError
from vipo.perception.orientation import orientation_scores
from vipo.perception.structuring import PerceptualStructuring

COLORMAP = "inferno"
RawFormat = Literal["npy", "safetensors"]
_OPACITY = 0.6
_LONGEST_SIDE = 1024
_COMPARED = ("backbone", "layer", "input_size", "orientation")
# Inches: the widest figure and the widest panel.
_WIDEST, _PANEL = 15.0, 4.2
# Dots an inch; fewer for comparisons and clips, whose panels and frames add up.
_DPI, _MANY_DPI = 150, 100
_FRAMES = 16


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


@dataclass(frozen=True)
class _Mapped:
    """What one configuration makes of a clip of T frames.

    Attributes:
        maps: ``(T, h, w)`` float32.
        constant: whether there is no structure.
        components: ``(T, K, h', w')`` float32, the oriented projections in [0, 1]; of a clip, onto the principal
            directions of all its frames together, so that a colour means the same in each.
        explained: ``(K,)``, ratios of explained variance.
        config: the configuration, with the orientation rule that was used.
        evidence: what that rule rests on.
    """

    maps: Tensor
    constant: bool
    components: Tensor
    explained: Tensor
    config: PerceptionConfig
    evidence: str


def map_images(
    paths: Sequence[Path],
    output: Path,
    configs: Sequence[PerceptionConfig],
    device: str = "cpu",
    raw: RawFormat | None = None,
) -> list[Path]:
    """Draw the allocation maps of pictures and clips as PNG, of a clip as animated PNG (lossless).

    Under one configuration: picture, principal components as colours (the first three as red, green and blue), map
    and overlay side by side. Under several: the picture and one overlay each; a row where only one of backbone, layer,
    input size and orientation varies, else one row for each backbone, layer and input size.

    Args:
        paths: pictures and clips that `read_clip` reads, of any size and mode, or folders of them.
        output: a ``.png`` file for one picture, or a folder that receives ``<stem>.png`` for each.
        configs: sections `perception`.
        device: where backbones run.
        raw: also write the arrays, beside each figure. ``npy``: the map alone, ``(h, w)``, of a clip ``(T, h, w)``.
            ``safetensors``: `map`, `components`, `explained_variance_ratio` and, as metadata, the configuration; under
            several configurations with a dot and their number from 0 behind each name.

    Returns:
        The figures written, in the order of the pictures.

    Raises:
        PerceptionError: a picture is missing, unreadable or extremely elongated, two pictures or a picture and its
            own map share a name, one ``.npy`` would have to hold several maps, the output cannot be written (all
            before any model is loaded, but for a full disk), or a backbone cannot be used.
    """
    paths = find_pictures(paths)
    if raw == "npy" and len(configs) > 1:
        raise PerceptionError(f"raw: one .npy file cannot hold {len(configs)} maps; write safetensors")
    targets = _targets(paths, output)
    for path in paths:
        read_clip(path)
    folder = targets[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PerceptionError(f"{folder}: cannot be made ({error}); choose another output") from error
    if not os.access(folder, os.W_OK):
        raise PerceptionError(f"{folder}: is not writable; choose another output")
    structurings = [
        PerceptualStructuring(backbone, config)
        for _, same in groupby(configs, _without_orientation)
        for backbone, config in _with_one_backbone(list(same), device)
    ]
    for path, target in zip(paths, targets, strict=True):
        clip = read_clip(path)
        for structuring in structurings:
            structuring.preflight((clip.frames.shape[2], clip.frames.shape[3]))
        mapped = [_map(clip.frames.to(device), structuring) for structuring in structurings]
        _draw(clip, mapped, target)
        if raw is not None:
            _write_raw(mapped, target.with_suffix(f".{raw}"), still=len(clip.frames) == 1)
    return targets


def _without_orientation(config: PerceptionConfig) -> PerceptionConfig:
    return config.model_copy(update={"orientation": None})


def _with_one_backbone(configs: Sequence[PerceptionConfig], device: str) -> list[tuple[Any, PerceptionConfig]]:
    backbone = load_backbone(configs[0], device)
    return [(backbone, config) for config in configs]


def _targets(paths: Sequence[Path], output: Path) -> list[Path]:
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


def _map(frames: Tensor, structuring: PerceptualStructuring) -> _Mapped:
    size = map_size(frames.shape[2], frames.shape[3])
    if len(frames) == 1:
        found = structuring(frames, size)
        maps = found.maps
    else:
        found = structuring(frames[None], size, [range(index, index + 1) for index in range(len(frames))])
        maps = found.maps[0]
    found.check()
    features = torch.cat([structuring.backbone(chunk) for chunk in frames.split(_FRAMES)])
    count, _, height, width = features.shape
    together = features.transpose(0, 1).reshape(1, -1, count * height, width)
    principal = principal_components(together, structuring.config.components)
    projections = principal.projections[0].unflatten(1, (count, height)).transpose(0, 1)
    centred = projections - projections.mean(dim=(2, 3), keepdim=True)
    score = orientation_scores(centred, features, structuring.orientation).sum(dim=0)
    oriented = projections * torch.where(score < 0, -1.0, 1.0)[:, None, None]
    return _Mapped(
        maps=maps.cpu(),
        constant=bool(found.constant[0]),
        components=minmax(oriented, dims=(0, 2, 3))[0].float().cpu(),
        explained=principal.explained[0].float().cpu(),
        config=structuring.config.model_copy(update={"orientation": structuring.orientation}),
        evidence=structuring.evidence,
    )


def _write_raw(mapped: Sequence[_Mapped], target: Path, *, still: bool) -> None:
    def squeezed(array: Tensor) -> Tensor:
        return (array[0] if still else array).contiguous()

    arrays, metadata = {}, {}
    for index, item in enumerate(mapped):
        suffix = f".{index}" if len(mapped) > 1 else ""
        arrays[f"map{suffix}"] = squeezed(item.maps)
        arrays[f"components{suffix}"] = squeezed(item.components)
        arrays[f"explained_variance_ratio{suffix}"] = item.explained
        metadata[f"perception{suffix}"] = json.dumps(item.config.model_dump(mode="json"), sort_keys=True)

    def write(partial: Path) -> None:
        if target.suffix == ".npy":
            with partial.open("wb") as stream:
                np.save(stream, arrays["map"].numpy(), allow_pickle=False)
        else:
            from safetensors.torch import save_file

            save_file(arrays, partial, metadata=metadata)

    _replace(target, write)


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    """Write beside, then rename: a file is there whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        write(partial)
        partial.replace(target)
    except OSError as error:
        raise PerceptionError(
            f"{target}: cannot be written ({error}); free disk space or choose another output"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Panel:
    """One picture of a figure, and how it changes: ``(T, H, W, 3)`` colours or ``(T, h, w)`` values of the map."""

    title: str
    frames: NDArray[np.float32]


def _colours(frames: Tensor) -> NDArray[np.float32]:
    return frames.permute(0, 2, 3, 1).numpy()


def _overlays(frames: Tensor, maps: Tensor) -> NDArray[np.float32]:
    return _colours(torch.stack([overlay(image, heat) for image, heat in zip(frames, maps, strict=True)]))


def _panels(frames: Tensor, mapped: Sequence[_Mapped]) -> list[list[_Panel]]:
    """Rows of panels; each row starts with the picture."""
    if len(mapped) == 1:
        (item,) = mapped
        red_green_blue = item.components[:, :3]
        red_green_blue = F.pad(red_green_blue, (0, 0, 0, 0, 0, 3 - red_green_blue.shape[1]))
        return [
            [
                _Panel("picture", _colours(frames)),
                _Panel("principal components", _colours(red_green_blue)),
                _Panel("no structure: uniform map" if item.constant else "allocation map", item.maps.numpy()),
                _Panel("overlay", _overlays(frames, item.maps)),
            ]
        ]
    varying = [name for name in _COMPARED if len({getattr(item.config, name) for item in mapped}) > 1]
    rows = [list(row) for _, row in groupby(mapped, lambda item: _without_orientation(item.config))]
    if all(len(row) == 1 for row in rows):
        rows = [[item for row in rows for item in row]]
    shared = [name for name in varying if len(rows) > 1 and name != "orientation"]
    panels = []
    for row in rows:
        first = _described(row[0].config, shared) or "picture"
        titles = [_described(item.config, [name for name in varying if name not in shared]) for item in row]
        overlays = [_Panel(title, _overlays(frames, item.maps)) for title, item in zip(titles, row, strict=True)]
        panels.append([_Panel(first, _colours(frames)), *overlays])
    return panels


def _described(config: PerceptionConfig, names: Sequence[str]) -> str:
    told = {
        "backbone": config.backbone,
        "layer": "default layer" if config.layer is None else f"layer {config.layer}",
        "input_size": "default size" if config.input_size is None else f"{config.input_size} px",
        "orientation": str(config.orientation),
    }
    return ", ".join(told[name] for name in names)


def _draw(clip: Clip, mapped: Sequence[_Mapped], target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(clip.frames)
    shrink = min(1.0, _LONGEST_SIDE / max(clip.frames.shape[2:]))
    height, width = (max(1, round(side * shrink)) for side in clip.frames.shape[2:])
    frames = F.interpolate(clip.frames, size=(height, width), mode="bilinear", antialias=True).clamp(0, 1)
    rows = _panels(frames, mapped)
    columns = max(map(len, rows))
    panel = min(_PANEL, _WIDEST / columns)
    aspect = height / width
    breadth, length = (panel, panel * aspect) if aspect <= 1 else (panel / aspect, panel)
    figure = Figure(
        figsize=(columns * breadth + 1.1, len(rows) * (length + 0.3) + 0.45),
        dpi=_DPI if count == len(mapped) == 1 else _MANY_DPI,
        facecolor="white",
        layout="constrained",
    )
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(len(rows), columns, squeeze=False)
    highest = max(1.0, *(float(item.maps.max()) for item in mapped))
    # Nearest keeps small pictures crisp; larger ones have no visible pixels.
    interpolation = "nearest" if max(height, width) <= 256 else "antialiased"
    shown = []
    for row, places in zip(rows, axes, strict=True):
        for place in places:
            place.set_axis_off()
        for item, place in zip(row, places, strict=False):
            place.set_title(item.title, fontsize=10, parse_math=False)
            style: dict[str, Any] = {"interpolation": interpolation} if item.frames.ndim == 4 else {}
            shown.append(
                (
                    place.imshow(
                        item.frames[0], cmap=COLORMAP, vmin=0, vmax=highest, extent=(0, width, height, 0), **style
                    ),
                    item.frames,
                )
            )
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(
        ScalarMappable(Normalize(0, highest), COLORMAP), ax=axes, fraction=0.03, pad=0.01, aspect=22 * len(rows)
    )
    bar.set_label("weight of the advantage", fontsize=8)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    figure.supxlabel(_note(mapped), fontsize=7, color="0.4", parse_math=False)
    pages = []
    for index in range(count):
        for picture, values in shown:
            picture.set_data(values[index])
        canvas.draw()
        pages.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    options: dict[str, Any] = {"optimize": True}
    if count > 1:
        durations = [round(value) for value in clip.milliseconds]
        options = {"save_all": True, "append_images": pages[1:], "duration": durations, "loop": 0}
    _replace(target, lambda partial: pages[0].save(partial, format="PNG", **options))


def _note(mapped: Sequence[_Mapped]) -> str:
    config = mapped[0].config
    same = [name for name in _COMPARED if len({getattr(item.config, name) for item in mapped}) == 1]
    parts = [
        _described(config, [name]) if name != "orientation" else f"orientation {config.orientation}" for name in same
    ]
    parts += [f"{config.components} components", config.aggregation, f"smoothing {config.smoothing:g}"]
    evidence = {item.evidence for item in mapped}
    return " · ".join(parts) + (f"\norientation: {evidence.pop()}" if len(evidence) == 1 else "")
