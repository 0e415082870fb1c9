"""Photographs with outlined objects, and composites of them: what orientation rules are measured on besides scenes.

The outlines are a COCO file in `data/masks/`; the photographs themselves come with scikit-image and scikit-learn. In
a composite an object is cut out along its outline and pasted onto a rectangle of another photograph that shows no
object, so that photographed objects too are off centre, large, small and several.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from vipo.maps.pictures import read_image
from vipo.maps.scoring import Kind, Scored
from vipo.perception.errors import PerceptionError

COMPOSITE_SIZE = 256
"""Height and width of composites in pixels."""

_DISTRIBUTIONS: Mapping[str, str] = MappingProxyType({"skimage": "scikit-image", "sklearn": "scikit-learn"})
_BACKGROUND = "background"
# Outlines are drawn this much larger and averaged down: shares of pixels instead of a staircase.
_SUPERSAMPLING = 4
# Longer objects, scaled to a small area, are thinner than a cell of the map.
_LARGEST_ASPECT = 2.0
_AREAS: Mapping[Kind, tuple[float, float]] = MappingProxyType(
    {
        "centred": (0.10, 0.16),
        "off centre": (0.05, 0.10),
        "large": (0.30, 0.42),
        "small": (0.02, 0.03),
        "several": (0.04, 0.08),
    }
)
_LEAST_OFFSET = 0.2


@dataclass(frozen=True)
class Photograph:
    """A photograph and what is outlined in it.

    Attributes:
        name: file name.
        image: ``(3, H, W)`` float32 in [0, 1].
        kind: which kind of scene its objects make; None: it shows no object.
        objects: ``(n, H, W)`` float32, share of each pixel that each object covers.
        backgrounds: rectangles without an object: left, top, width, height in pixels.
    """

    name: str
    image: Tensor
    kind: Kind | None
    objects: Tensor
    backgrounds: tuple[tuple[int, int, int, int], ...]


def load_photographs(outlines: Path) -> list[Photograph]:
    """Read photographs that installed packages ship, with their outlines.

    Args:
        outlines: COCO file; `file_name` is relative to the folder that packages are installed in, a category is a
            kind of scene or ``background``.

    Raises:
        PerceptionError: a package is not installed, or ships another photograph than the one that was outlined.
    """
    coco = json.loads(outlines.read_text(encoding="utf-8"))
    categories = {item["id"]: item["name"] for item in coco["categories"]}
    found = []
    for entry in coco["images"]:
        image = read_image(_installed(entry["file_name"], entry["sha256"]))
        mine = [item for item in coco["annotations"] if item["image_id"] == entry["id"]]
        objects = [item for item in mine if categories[item["category_id"]] != _BACKGROUND]
        masks = [_mask(item["segmentation"], image.shape[1], image.shape[2]) for item in objects]
        found.append(
            Photograph(
                name=Path(entry["file_name"]).name,
                image=image,
                kind=categories[objects[0]["category_id"]] if objects else None,
                objects=torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:]),
                backgrounds=tuple(_rectangle(*item["bbox"]) for item in mine if item not in objects),
            )
        )
    return found


def _rectangle(left: int, top: int, width: int, height: int) -> tuple[int, int, int, int]:
    return left, top, width, height


def _installed(file_name: str, sha256: str) -> Path:
    package = _DISTRIBUTIONS[Path(file_name).parts[0]]
    try:
        path = Path(str(distribution(package).locate_file(file_name)))
    except PackageNotFoundError:
        raise PerceptionError(f"photographs: {file_name} comes with the package {package}; install {package}") from None
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise PerceptionError(
            f"photographs: {path} is missing or not the photograph that was outlined; install another release of "
            f"{package}"
        )
    return path


def _mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> Tensor:
    canvas = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon([_SUPERSAMPLING * value for value in polygon], fill=255)
    return torch.from_numpy(np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) / 255)


def photographed(photographs: Sequence[Photograph]) -> dict[Kind, list[Scored]]:
    """The photographs as they were taken, by kind, each a batch of one with all its objects in one mask."""
    scenes: dict[Kind, list[Scored]] = {kind: [] for kind in _AREAS}
    for item in photographs:
        if item.kind is not None:
            scenes[item.kind].append(Scored(item.image[None], item.objects.amax(dim=0, keepdim=True)))
    return scenes


def composites(photographs: Sequence[Photograph], count: int, seed: int) -> dict[Kind, list[Scored]]:
    """`count` composites of each kind, of `COMPOSITE_SIZE` pixels a side; the same seed gives the same pictures.

    Whole objects only: one that its photograph cuts off, or that is more than twice as long as wide, is not pasted.
    Area as share of the picture: centred .10 to .16, off centre .05 to .10 (at least .2 of the side away from the
    centre), large .30 to .42, small .02 to .03 anywhere, several: two of .04 to .08, one in each half.

    Raises:
        ValueError: no photograph has such an object, or none but the object's own has a background.
    """
    cutouts = [(item, cut) for item in photographs for cut in _cutouts(item)]
    return {
        kind: [_batch(kind, cutouts, photographs, count, np.random.default_rng([seed, *kind.encode()]))]
        for kind in _AREAS
    }


def _cutouts(item: Photograph) -> list[Tensor]:
    """Objects ``(4, h, w)``: colour times coverage, and coverage."""
    found = []
    for mask in item.objects:
        rows, columns = mask.amax(dim=1).nonzero().flatten(), mask.amax(dim=0).nonzero().flatten()
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        height, width = bottom - top, right - left
        whole = top > 0 and left > 0 and bottom < mask.shape[0] and right < mask.shape[1]
        if whole and max(height, width) <= _LARGEST_ASPECT * min(height, width):
            cover = mask[top:bottom, left:right]
            found.append(torch.cat([item.image[:, top:bottom, left:right] * cover, cover[None]]))
    return found


def _batch(
    kind: Kind,
    cutouts: Sequence[tuple[Photograph, Tensor]],
    photographs: Sequence[Photograph],
    count: int,
    rng: np.random.Generator,
) -> Scored:
    owners = list(dict.fromkeys(item.name for item, _ in cutouts))
    images, masks = [], []
    for _ in range(count):
        # By photograph first: one of them holds most of the objects.
        names = rng.choice(owners, size=2 if kind == "several" else 1, replace=False)
        chosen = []
        for name in names:
            own = [cut for item, cut in cutouts if item.name == name]
            chosen.append(own[int(rng.integers(len(own)))])
        grounds = [item for item in photographs if item.backgrounds and item.name not in names]
        picture = _background(grounds[int(rng.integers(len(grounds)))], rng)
        mask = torch.zeros(picture.shape[1:])
        across, first = bool(rng.integers(2)), bool(rng.integers(2))
        for index, cut in enumerate(chosen):
            scaled = _scaled(cut, rng.uniform(*_AREAS[kind]))
            height, width = scaled.shape[1:]
            y, x = _centre(kind, (first + index) % 2, across, (height, width), rng)
            top, left = round(y - height / 2), round(x - width / 2)
            window = (slice(top, top + height), slice(left, left + width))
            picture[:, *window] = picture[:, *window] * (1 - scaled[3]) + scaled[:3]
            mask[window] = torch.maximum(mask[window], scaled[3])
        images.append(picture)
        masks.append(mask)
    return Scored(torch.stack(images).clamp(0, 1), torch.stack(masks))


def _background(item: Photograph, rng: np.random.Generator) -> Tensor:
    left, top, width, height = item.backgrounds[int(rng.integers(len(item.backgrounds)))]
    side = min(width, height)
    left, top = left + int(rng.integers(width - side + 1)), top + int(rng.integers(height - side + 1))
    return _resized(item.image[:, top : top + side, left : left + side], (COMPOSITE_SIZE, COMPOSITE_SIZE))


def _scaled(cut: Tensor, area: float) -> Tensor:
    """The object at a share of the picture's area, but never longer than the picture is."""
    height, width = cut.shape[1:]
    scale = min(COMPOSITE_SIZE * (area / float(cut[3].sum())) ** 0.5, COMPOSITE_SIZE / max(height, width))
    return _resized(cut, (max(1, round(height * scale)), max(1, round(width * scale))))


def _resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]


def _centre(
    kind: Kind, half: int, across: bool, size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, float]:
    """Where an object of `size` pixels goes: row and column of its middle."""
    room = np.array([COMPOSITE_SIZE - side for side in size]) / 2
    if kind in ("centred", "large"):
        offset = np.clip(rng.uniform(-0.04, 0.04, 2) * COMPOSITE_SIZE, -room, room)
    elif kind == "several":
        offset = rng.uniform(-0.08, 0.08, 2) * COMPOSITE_SIZE
        offset[int(across)] += (0.25 if half else -0.25) * COMPOSITE_SIZE
        offset = np.clip(offset, -room, room)
    else:
        least = _LEAST_OFFSET * COMPOSITE_SIZE if kind == "off centre" else 0.0
        offset = rng.uniform(-room, room)
        while np.abs(offset).max() < least:
            offset = rng.uniform(-room, room)
    return COMPOSITE_SIZE / 2 + float(offset[0]), COMPOSITE_SIZE / 2 + float(offset[1])
