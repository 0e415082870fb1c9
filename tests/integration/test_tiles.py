"""`generator.decoding=tiled` is the stock pipeline's own tiling, in a family of each autoencoder."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES

from vipo.config.compose import load_config
from vipo.conformance.checks import deterministic_sample, sample
from vipo.conformance.subject import Subject, subject
from vipo.generators import GeneratorError, load_generator
from vipo.generators.wan import WanGenerator

ROOT = Path(__file__).resolve().parents[2]
# One a class of autoencoder.
TILED = (
    "flux",
    "flux2_klein",
    "qwen_image",
    "qwen_image_21",
    "sana",
    "wan",
    "wan22_ti2v",
    "hunyuan_video",
    "cogvideox",
    "ltx2",
)


def _shrink(vae: Any, latents: int, scale: int) -> None:
    """Let a tile be so many latent pixels a side, half of which it shares with the next one."""
    for name in ("size", "height", "width", ""):
        for key, value in (
            (f"tile_sample_min_{name}", latents * scale),
            (f"tile_latent_min_{name}", latents),
            (f"tile_sample_stride_{name}", latents * scale // 2),
            (f"tile_overlap_factor_{name}".rstrip("_"), 0.5),
        ):
            if hasattr(vae, key):
                setattr(vae, key, value)


@pytest.mark.parametrize("family", TILED)
def test_a_sample_in_tiles_is_the_stock_pipelines(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = FAMILIES[family]
    folder = row.write(tmp_path / family)
    small: Any = load_generator(row.config(folder), ROOT)
    scale, kind = small.config.width // small.latent_shape[-1], type(small.vae)
    # Sana's stock pipeline takes multiples of 32 pixels.
    latents, enable = 16 if family == "sana" else 4, kind.enable_tiling

    def compared(decoding: str) -> Subject:
        size = {"height": latents * scale, "width": 2 * latents * scale}
        return subject(row.config(folder, decoding=decoding, **size), ROOT, steps=row.steps)

    def in_small_tiles(vae: Any) -> None:
        enable(vae)
        _shrink(vae, latents, scale)

    whole = compared("whole")
    generator = whole.load()

    monkeypatch.setattr(kind, "enable_tiling", in_small_tiles)
    tiled = compared("tiled")
    [found] = sample(tiled)
    assert found.result == "ok", found
    assert not torch.equal(deterministic_sample(tiled.load(), tiled), deterministic_sample(generator, whole))


def test_tiles_that_are_none_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = FAMILIES["wan"]
    folder = row.write(tmp_path / "wan")
    with caplog.at_level(logging.WARNING):
        load_generator(row.config(folder, decoding="tiled"), ROOT)
    assert "no effect: a sample of " in caplog.text

    class Whole(WanGenerator):
        @classmethod
        def load(cls, config: Any, root: Path) -> Any:
            return super().load(config.model_copy(update={"decoding": "whole"}), root)

    with pytest.raises(GeneratorError, match="decoding tiled: family 'wan' decodes samples whole"):
        load_generator(row.config(folder, decoding="tiled"), ROOT, Whole)
    with pytest.raises(GeneratorError, match="counts 8 pixels a latent of AutoencoderTiny, of which this"):
        load_generator(load_config(["experiment=demo", "arm=vipo", "generator.decoding=tiled"]).generator, ROOT)
