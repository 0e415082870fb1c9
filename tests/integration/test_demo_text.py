"""The generator of words: one of its kind is built, and its experiment trains with the reader's boxes as credit."""

import json
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from tiny import TINY_PRETRAIN

from vipo.config.compose import load_config, repository_root
from vipo.config.pretrain import PretrainConfig
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


def test_boxes_are_credit(tiny: Path, tmp_path: Path) -> None:
    small = [
        "sampling.steps=3",
        "training.updates=1",
        "training.group_size=4",
        "training.micro_batch=4",
        "training.trained_transitions=1",
        "training.save_at=[]",
        "tracking.trackers=[]",
        # The generator has learned nothing, so one of the settings that count its boxes must be generous.
        "reward.terms=[{name: ocr, options: {side: 128, confidence: 0}}]",
    ]
    config = load_config(["experiment=demo_text", "arm=boxes", f"generator.path={tiny}", *small])
    train_stage(config, ROOT, tmp_path)
    (row,) = map(json.loads, (tmp_path / "demo_text/runs/boxes-s0/metrics.jsonl").read_text().splitlines())
    print(row)
    raise AssertionError
