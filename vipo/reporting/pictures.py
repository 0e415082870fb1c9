"""Every shown sample as a small picture and its map as a veil over it: inside the page, or as files beside it."""

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vipo.maps.veil import dimmed, veil
from vipo.reporting.films import encode_film
from vipo.reporting.gallery import HISTORY_PROMPTS, PICTURES, Gallery, Shot, ShownPrompt
from vipo.reporting.inputs import Experiment, ReportError, Run
from vipo.reporting.sampled import Maps, read_frames, sample_file

#: Larger pictures are reduced to this longer side in pixels.
MAXIMUM_SIDE = 384
#: Pictures of at most this longer side keep hard pixel edges when enlarged; final ones are stored without loss.
PIXEL_ART_SIDE = 128
#: A page holds its pictures itself up to this many bytes of them.
INLINE_BYTES = 12 * 2**20
_VEIL_SIDE = 192


def read_gallery(experiment: Experiment, *, inline: bool = False) -> Gallery:
    """The first sample of every held-out prompt: nothing is hand-picked.

    Args:
        inline: whether the page holds its pictures however many bytes they are.

    Raises:
        ReportError: a final sample or its map is missing or unreadable.
    """
    store = _Store()
    base = experiment.scores[experiment.scores["arm"] == "base"]
    sample = int(base["sample"].min())
    chosen = base[base["sample"] == sample].drop_duplicates("prompt_id")
    shots: dict[str, list[Shot]] = {str(prompt): [] for prompt in chosen["prompt_id"]}
    for run in experiment.runs:
        for prompt, shot in _shots(experiment, run, list(shots), sample, store):
            shots[prompt].append(shot)
    texts = zip(chosen["prompt_id"], chosen["prompt"], strict=True)
    prompts = tuple(ShownPrompt(str(prompt), str(text), tuple(shots[str(prompt)])) for prompt, text in texts)
    config = experiment.config.generator
    gallery = Gallery(
        prompts,
        {},
        (config.width, config.height),
        max(config.width, config.height) <= PIXEL_ART_SIDE,
    )
    return store.placed(gallery, inline)


class _Store:
    """Encoded pictures by name: by their content, so that equal ones are stored once and none is read for another."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}

    def add(self, content: bytes, suffix: str) -> str:
        """A reference to `content`."""
        name = f"{PICTURES}/{hashlib.sha256(content).hexdigest()[:20]}.{suffix}"
        self._files[name] = content
        return name

    def placed(self, gallery: Gallery, inline: bool) -> Gallery:
        """`gallery` with its pictures as data URIs where they are few, else with files beside the page."""
        if not inline and sum(map(len, self._files.values())) > INLINE_BYTES:
            return replace(gallery, files=self._files)
        kinds = {"webp": "image/webp", "webm": "video/webm"}
        uris = {
            name: f"data:{kinds[name.rpartition('.')[2]]};base64,{base64.b64encode(content).decode('ascii')}"
            for name, content in self._files.items()
        }
        prompts = tuple(
            replace(
                prompt,
                shots=tuple(
                    replace(
                        shot,
                        picture=uris[shot.picture],
                        veil=uris.get(shot.veil or ""),
                        film=uris.get(shot.film or ""),
                        veiled_film=uris.get(shot.veiled_film or ""),
                        veiled_picture=uris.get(shot.veiled_picture or ""),
                    )
                    for shot in prompt.shots
                ),
            )
            for prompt in gallery.prompts
        )
        return replace(gallery, prompts=prompts)


def _shots(
    experiment: Experiment, run: Run, prompts: Sequence[str], sample: int, store: _Store
) -> Iterator[tuple[str, Shot]]:
    table = experiment.scores
    mine = table[(table["run"] == run.name) & (table["sample"] == sample)]
    rows = {(str(row["prompt_id"]), int(row["update"])): row for row in mine.to_dict("records")}
    final = int(mine.loc[mine["final"], "update"].max())
    updates = sorted({update for _, update in rows})
    maps = Maps(experiment.folder, run.name)
    for number, prompt in enumerate(prompts):
        for update in updates if number < HISTORY_PROMPTS else [final]:
            path = sample_file(experiment.folder, run.name, update, prompt, sample)
            if (prompt, update) not in rows:
                raise ReportError(
                    f"{run.name}: no sample {sample} of prompt {prompt} at update {update} in its scores; "
                    "evaluate it again"
                )
            # Pictures of kept updates may have been removed to save space; their scores have not.
            if update != final and not path.is_file():
                continue
            frames, rate = read_frames(path)
            heat = maps.read(final, prompt, sample) if update == final else None
            row = rows[prompt, update]
            yield (
                prompt,
                Shot(
                    run=run.name,
                    arm=run.config.arm,
                    seed=run.config.seed,
                    update=update,
                    final=update == final,
                    **_encoded(frames, rate, heat, maps.groups, store)._asdict(),
                    scores={column: float(row[column]) for column in [*experiment.rewards, *experiment.changes]},
                    original=path.relative_to(experiment.folder).as_posix(),
                ),
            )


class _Media(NamedTuple):
    """References to what `Shot` has of the same names."""

    picture: str
    veil: str | None
    film: str | None
    veiled_film: str | None
    veiled_picture: str | None


def _encoded(
    frames: Sequence[NDArray[np.uint8]],
    rate: float,
    heat: NDArray[np.float32] | None,
    groups: Sequence[Sequence[int]] | None,
    store: _Store,
) -> _Media:
    shown = [np.asarray(_thumbnail(Image.fromarray(pixels))) for pixels in frames]
    picture = store.add(
        _webp(Image.fromarray(shown[0]), lossless=heat is not None and max(shown[0].shape) <= PIXEL_ART_SIDE), "webp"
    )
    film = None if groups is None else store.add(encode_film(shown, rate), "webm")
    if heat is None:
        return _Media(picture, None, film, None, None)
    heats = torch.from_numpy(heat)
    if groups is None:
        height, width = shown[0].shape[:2]
        scale = max(1.0, _VEIL_SIDE / max(height, width))
        laid = veil(heats, (round(height * scale), round(width * scale)))
        return _Media(picture, store.add(_webp(laid), "webp"), None, None, None)
    latent = {frame: number for number, (first, end) in enumerate(groups) for frame in range(first, end)}
    plain = [torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 for pixels in shown]
    over = [dimmed(page, heats[latent[number]]) for number, page in enumerate(plain)]
    pages = [(page.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for page in over]
    first = store.add(_webp(Image.fromarray(pages[0])), "webp")
    return _Media(picture, None, film, store.add(encode_film(pages, rate), "webm"), first)


def _thumbnail(picture: Image.Image) -> Image.Image:
    picture.thumbnail((MAXIMUM_SIDE, MAXIMUM_SIDE), Image.Resampling.LANCZOS)
    return picture


def _webp(picture: Image.Image, lossless: bool = False) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", lossless=lossless, quality=90, method=2)
    return stream.getvalue()
