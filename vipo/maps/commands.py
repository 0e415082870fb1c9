"""`vipo map` and `vipo orientation`. Heavy libraries are imported inside them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from vipo.config.compose import repository_root
from vipo.config.perception import PerceptionConfig
from vipo.config.section import DEVICE
from vipo.config.validation import ConfigError, validate_section
from vipo.text import visible

# From the section, whose module is light: the type behind it would import torch for --help.
_ORIENTATIONS: tuple[str, ...] = get_args(get_args(PerceptionConfig.model_fields["orientation"].annotation)[0])

Backbones = Annotated[
    list[str] | None,
    typer.Option("--backbone", help="'efficientnet_lite0' (packaged, the default), any timm name, or an import path."),
]
Weights = Annotated[
    str | None, typer.Option(help="Local weights (safetensors file or folder) of a timm backbone; for one backbone.")
]
Layers = Annotated[
    list[int] | None, typer.Option("--layer", help="Feature stage or block; default: the backbone's own.")
]
InputSizes = Annotated[
    list[int] | None,
    typer.Option("--input-size", help="Shorter side in pixels fed to the backbone; default: the backbone's own."),
]
Components = Annotated[int, typer.Option(help="K, the number of principal directions.")]
Smoothing = Annotated[float, typer.Option(help="Gaussian sigma on the patch grid; 0 turns it off.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def _check_device(name: str) -> None:
    """Before any library is asked, to some of which a number too large is no device but an overflow."""
    if not re.match(DEVICE, name):
        raise ConfigError(f"--device: {name[:40]!r} is none of cpu, cuda, cuda:N (N at most 99)")


def _perception(choices: Mapping[str, Sequence[object] | None], **shared: object) -> list[PerceptionConfig]:
    """A section `perception` for each combination of what was chosen; the last choice varies fastest."""
    if shared["weights"] is not None and len(choices["backbone"] or ()) > 1:
        raise ConfigError("--weights: belongs to one backbone, but several are given; compare them one at a time")
    given = {name: dict.fromkeys(values) for name, values in choices.items() if values}
    return [
        validate_section(PerceptionConfig, {**shared, **dict(zip(given, combination, strict=True))})
        for combination in itertools.product(*given.values())
    ]


def map_command(
    images: Annotated[list[Path], typer.Argument(help="Pictures, animations and films to map, or folders of them.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .png file for one picture or clip, a folder for several.")
    ],
    backbone: Backbones = None,
    weights: Weights = None,
    layer: Layers = None,
    input_size: InputSizes = None,
    orientation: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(_ORIENTATIONS)}, or all of them: 'all'; default: the backbone's own."),
    ] = None,
    components: Components = 3,
    smoothing: Smoothing = 1.0,
    raw: Annotated[
        str | None, typer.Option(help="Also write the arrays: npy (the map) or safetensors (components as well).")
    ] = None,
    style: Annotated[
        str,
        typer.Option(
            help="sheet (picture, map, components, figures), overlay (surroundings dimmed) or contour (lines)."
        ),
    ] = "sheet",
    device: Device = "cpu",
) -> None:
    """Draw the allocation map over any picture or clip: where ViPO would send the credit.

    Give --backbone, --layer, --input-size or --orientation several times to compare side by side.
    """
    _check_device(device)
    if raw not in (None, "npy", "safetensors"):
        raise ConfigError(f"--raw: {raw!r} is neither npy nor safetensors")
    if style not in ("sheet", "overlay", "contour"):
        raise ConfigError(f"--style: {style!r} is none of sheet, overlay, contour")
    choices = {
        "backbone": backbone,
        "layer": layer,
        "input_size": input_size,
        "orientation": _ORIENTATIONS if orientation == ["all"] else orientation,
    }
    configs = _perception(choices, weights=weights, components=components, smoothing=smoothing)
    from vipo.maps.show import map_images

    for path in map_images(images, output, configs, device, raw, style):  # type: ignore[arg-type]
        typer.echo(visible(str(path)))


def orientation(
    backbone: Backbones = None,
    weights: Weights = None,
    layer: Layers = None,
    input_size: InputSizes = None,
    components: Components = 3,
    smoothing: Smoothing = 1.0,
    scenes: Annotated[int, typer.Option(min=1, max=10_000, help="Drawn scenes, and composites, of each kind.")] = 40,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Which scenes are drawn.")] = 0,
    photographs: Annotated[
        bool,
        typer.Option(
            "--photographs", help="Also photographs of scikit-image and scikit-learn, and composites of them."
        ),
    ] = False,
    device: Device = "cpu",
) -> None:
    """Score every orientation rule against known objects: one Markdown table.

    A cell is the mean area under the ROC curve of the maps; in brackets the share of pictures below 0.5.
    """
    _check_device(device)
    choices = {"backbone": backbone, "layer": layer, "input_size": input_size}
    configs = _perception(choices, weights=weights, components=components, smoothing=smoothing)
    from vipo.maps.photographs import composites, load_photographs, photographed
    from vipo.maps.scoring import drawn_scenes, orientation_table

    sources = {"drawn": drawn_scenes(scenes, seed)}
    if photographs:
        taken = load_photographs(repository_root() / "data" / "masks" / "photographs.json")
        sources |= {"composite": composites(taken, scenes, seed), "photograph": photographed(taken)}
    for line in orientation_table(configs, sources, device):
        typer.echo(visible(line))
