"""The figures behind `vipo map`: what it reads, maps and writes."""

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
from PIL import Image
from torch import Tensor

from vipo.config.perception import PerceptionConfig
from vipo.maps.pictures import Clip, find_pictures, map_size, read_clip
from vipo.maps.render import Style, as_image, contoured, enlarged, overlaid, sheet, side_by_side, with_note
from vipo.perception.allocator import minmax
from vipo.perception.components import principal_components
from vipo.perception.errors import PerceptionError
from vipo.perception.loading import load_backbone
from vipo.perception.orientation import orientation_scores
from vipo.perception.structuring import PerceptualStructuring

RawFormat = Literal["npy", "safetensors"]
_COMPARED = ("backbone", "layer", "input_size", "orientation")
# Pixels of the longer side of a panel where maps are compared.
_COMPARED_SIDE = 300
_FRAMES = 16


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
    style: Style = "sheet",
) -> list[Path]:
    """Draw the allocation maps of pictures and clips as PNG, of a clip as animated PNG (lossless).

    Under one configuration, as `style` says. Under several: the picture and one map on it each; a row where only one
    of backbone, layer, input size and orientation varies, else one row for each backbone, layer and input size.

    Args:
        paths: pictures and clips that `read_clip` reads, of any size and mode, or folders of them.
        output: a ``.png`` file for one picture, or a folder that receives ``<stem>.png`` for each.
        configs: sections `perception`.
        device: where backbones run.
        raw: also write the arrays, beside each figure. ``npy``: the map alone, ``(h, w)``, of a clip ``(T, h, w)``.
            ``safetensors``: `map`, `components`, `explained_variance_ratio` and, as metadata, the configuration; under
            several configurations with a dot and their number from 0 behind each name.
        style: ``sheet``: two by two, picture, map on it, map as opacity, and principal components as colours, with the
            map's figures below. ``overlay``: the picture alone, dimmed where the map is low, with the map's lines.
            ``contour``: the picture as it is, with the lines alone.

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
        _draw(clip, mapped, target, style)
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


def _described(config: PerceptionConfig, names: Sequence[str]) -> str:
    told = {
        "backbone": config.backbone,
        "layer": "default layer" if config.layer is None else f"layer {config.layer}",
        "input_size": "default size" if config.input_size is None else f"{config.input_size} px",
        "orientation": str(config.orientation),
    }
    return ", ".join(told[name] for name in names)


def _draw(clip: Clip, mapped: Sequence[_Mapped], target: Path, style: Style) -> None:
    frames = enlarged(clip.frames) if len(mapped) == 1 else _small(clip.frames)
    pages = [_page(frames[index], mapped, index, style) for index in range(len(frames))]
    options: dict[str, Any] = {"optimize": True}
    if len(pages) > 1:
        durations = [round(value) for value in clip.milliseconds]
        options = {"save_all": True, "append_images": pages[1:], "duration": durations, "loop": 0}
    _replace(target, lambda partial: pages[0].save(partial, format="PNG", **options))


def _small(frames: Tensor) -> Tensor:
    """Frames for a comparison, whose panels add up."""
    scale = _COMPARED_SIDE / max(frames.shape[2:])
    size = [max(1, round(length * scale)) for length in frames.shape[2:]]
    if scale > 1:
        return F.interpolate(frames, size=size, mode="nearest")
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True).clamp(0, 1)


def _page(picture: Tensor, mapped: Sequence[_Mapped], index: int, style: Style) -> Image.Image:
    drawn = contoured if style == "contour" else overlaid
    if len(mapped) == 1:
        (item,) = mapped
        if style != "sheet":
            return drawn(picture, item.maps[index])
        explained = [float(value) for value in item.explained]
        return sheet(
            picture, item.maps[index], item.components[index], explained, constant=item.constant, note=_note(mapped)
        )
    rows = [
        [(first, as_image(picture)), *((title, drawn(picture, item.maps[index])) for title, item in row)]
        for first, row in _compared(mapped)
    ]
    return with_note(side_by_side(rows), _note(mapped).split("\n"))


def _compared(mapped: Sequence[_Mapped]) -> list[tuple[str, list[tuple[str, _Mapped]]]]:
    """Rows of several configurations, each with a name, and a title for each of its maps."""
    varying = [name for name in _COMPARED if len({getattr(item.config, name) for item in mapped}) > 1]
    rows = [list(row) for _, row in groupby(mapped, lambda item: _without_orientation(item.config))]
    if all(len(row) == 1 for row in rows):
        rows = [[item for row in rows for item in row]]
    shared = [name for name in varying if len(rows) > 1 and name != "orientation"]
    own = [name for name in varying if name not in shared]
    return [
        (_described(row[0].config, shared) or "picture", [(_described(item.config, own), item) for item in row])
        for row in rows
    ]


def _note(mapped: Sequence[_Mapped]) -> str:
    config = mapped[0].config
    same = [name for name in _COMPARED if len({getattr(item.config, name) for item in mapped}) == 1]
    parts = [
        _described(config, [name]) if name != "orientation" else f"orientation {config.orientation}" for name in same
    ]
    parts += [f"{config.components} components", config.aggregation, f"smoothing {config.smoothing:g}"]
    evidence = {item.evidence for item in mapped}
    return " · ".join(parts) + (f"\norientation: {evidence.pop()}" if len(evidence) == 1 else "")
