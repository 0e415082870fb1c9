"""The generator of clips: one of its kind is built and written as Wan is, and its experiment trains on it."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from tiny import ONE_UPDATE, TINY_PRETRAIN
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.config.pretrain import PretrainConfig
from vipo.rewards import object_redness
from vipo.sampling.noise import keyed_generator
from vipo.stages import train_stage
from vipo.training.pretrain import train_base
from vipo.training.pretrain_autoencoder import drawn_batch
from vipo.training.pretrain_clips import Clips

ROOT = repository_root()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion")
    small = {"drawn": "motion", "blocks": 1, "head_width": 48, "autoencoder_steps": 10, "autoencoder_batch_size": 4}
    train_base(PretrainConfig(**{**TINY_PRETRAIN, **small}), folder / "generator", folder / "work")
    return folder / "generator"


def test_the_stock_pipeline_films_with_it(tiny: Path) -> None:
    pipeline = WanPipeline.from_pretrained(tiny)
    assert isinstance(pipeline.vae, AutoencoderKLWan)
    assert isinstance(pipeline.transformer, WanTransformer3DModel)
    clip = pipeline(
        "a red circle moves left on a white background",
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=16,
        output_type="np",
    ).frames
    assert clip.shape == (1, 9, 32, 32, 3)


def test_pixels_beyond_the_range_are_learned_from() -> None:
    config = PretrainConfig(**{**TINY_PRETRAIN, "drawn": "motion"})
    torch.manual_seed(0)
    family = Clips(config, ["a"])
    vae = family.autoencoder()
    latents = 30 * torch.randn(2, config.latent_channels, 3, 4, 4)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(30)
    pixels = family.decode(vae, latents)
    assert pixels.shape == (2, 3, 9, 16, 16)
    assert pixels.abs().max() > 2
    torch.testing.assert_close(pixels.clamp(-1, 1), vae.decode(latents).sample)
    beyond = pixels[pixels > 1].sum()
    beyond.backward()
    assert vae.decoder.conv_out.bias.grad.abs().sum() > 0


def test_credit_goes_where_and_when_the_reward_looks(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator has learned nothing: the left half of every picture stands for the object."""

    def left_half(images: Tensor) -> Tensor:
        mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
        mask[..., : mask.shape[-1] // 2] = True
        return mask

    monkeypatch.setattr(object_redness, "foreground", left_half)
    config = load_config(["experiment=demo_video", "arm=where", f"generator.path={tiny}", *ONE_UPDATE])
    train_stage(config, ROOT, tmp_path)
    (row,) = map(json.loads, (tmp_path / "demo_video/runs/where-s0/metrics.jsonl").read_text().splitlines())
    assert (row["map/constant_share"], row["map/mean"]) == (0, pytest.approx(1))
    # Of 3 x 8 x 8 positions the left half of the last latent frame has all of it, as even as the edge leaves it.
    assert row["map/entropy"] == pytest.approx(math.log(32) / math.log(192), abs=0.03)


def test_the_autoencoder_of_clips_begins_with_frames() -> None:
    clips = torch.arange(6 * 9).view(6, 1, 9, 1, 1).expand(6, 3, 9, 2, 2)
    stills = drawn_batch(clips, 8, keyed_generator(0, "x"), stills=True)
    assert stills.shape == (32, 3, 1, 2, 2)
    assert len(stills[:, 0, 0, 0, 0].unique()) > 16, "of each clip another frame"
    assert drawn_batch(clips, 2, keyed_generator(0, "x"), stills=False).shape == (2, 3, 9, 2, 2)


@torch.no_grad()
def test_before_clips_are_learned_every_frame_is_what_stills_taught() -> None:
    """Each latent frame is the still of the last frame it stands for, and is drawn for all of them."""
    torch.manual_seed(0)
    family = Clips(PretrainConfig(**{**TINY_PRETRAIN, "drawn": "motion"}), ["a"])
    vae = family.autoencoder()
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    latents = family.encode(vae, clip)
    stills = [family.encode(vae, clip[:, :, frame : frame + 1]) for frame in (0, 4, 8)]
    torch.testing.assert_close(latents, torch.cat(stills, dim=2), rtol=1e-4, atol=1e-5)
    drawn = family.decode(vae, latents)
    frames = [family.decode(vae, latents[:, :, index : index + 1]) for index in (0, 1, 1, 1, 1, 2, 2, 2, 2)]
    torch.testing.assert_close(drawn, torch.cat(frames, dim=2), rtol=1e-4, atol=1e-5)
