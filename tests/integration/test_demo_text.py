"""The generator of words: one of its kind is built, and its experiment trains with the reader's boxes as credit."""

import itertools
import json
import math
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from tiny import ONE_UPDATE, TINY_PRETRAIN

from vipo.config.compose import load_config, repository_root
from vipo.config.pretrain import PretrainConfig
from vipo.demo.words import HEIGHT, WIDTH
from vipo.rewards.ocr import Ocr
from vipo.stages import train_stage
from vipo.training.pretrain import train_base

ROOT = repository_root()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    train_base(PretrainConfig(**{**TINY_PRETRAIN, "drawn": "words"}), folder / "generator", folder / "work")
    return folder / "generator"


def test_the_stock_pipeline_writes_with_it(tiny: Path) -> None:
    recorded = json.loads((tiny / "training_config.json").read_text())
    assert recorded["drawn"] == "words"
    pipeline = FluxPipeline.from_pretrained(tiny)
    (picture,) = pipeline(
        'the word "cat" in red on white',
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=0.0,
        max_sequence_length=16,
    ).images
    assert picture.size == (64, 32)


def test_boxes_are_credit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator has learned nothing: a reader stands in that finds letters in the left half of every picture."""
    texts = itertools.cycle(("no", "on", "nun", ""))
    left = [(0, 0), (WIDTH / 2 - 1, 0), (WIDTH / 2 - 1, HEIGHT), (0, HEIGHT)]
    monkeypatch.setattr(Ocr, "_lines", lambda _self, _picture: [(next(texts), left)])
    config = load_config(["experiment=demo_text", "arm=boxes", f"generator.path={tiny}", *ONE_UPDATE])
    train_stage(config, ROOT, tmp_path)
    (row,) = map(json.loads, (tmp_path / "demo_text/runs/boxes-s0/metrics.jsonl").read_text().splitlines())
    assert (row["map/constant_share"], row["map/mean"]) == (0, pytest.approx(1))
    # Of 8 x 16 positions the left half has all of it, as even as the resize's edge leaves it.
    assert row["map/entropy"] == pytest.approx(math.log(64) / math.log(128), abs=0.03)


def test_a_sample_without_text_is_credited_everywhere(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ocr, "_lines", lambda _self, _picture: [])
    config = load_config(["experiment=demo_text", "arm=boxes", f"generator.path={tiny}", *ONE_UPDATE])
    train_stage(config, ROOT, tmp_path)
    (row,) = map(json.loads, (tmp_path / "demo_text/runs/boxes-s0/metrics.jsonl").read_text().splitlines())
    assert (row["map/constant_share"], row["map/entropy"]) == (1, pytest.approx(1))
    assert row["reward/mean"] == 0
