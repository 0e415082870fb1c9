"""Of a run with a mean of its weights, what is handed over is what was evaluated."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from vipo.config.compose import load_config
from vipo.config.run import Config
from vipo.handover.base import Base, copy_parts
from vipo.handover.errors import ExportError
from vipo.handover.export import _check_whole, _handed_over
from vipo.stages import checkpoint_label


@pytest.mark.parametrize("evaluated", ["trained", "ema"])
def test_the_weights_are_those_that_were_evaluated(evaluated: str) -> None:
    files = ["transformer/config.json", "transformer/model.safetensors"]
    run: Any = SimpleNamespace(
        weights=dict.fromkeys([*files, *(f"ema/{name}" for name in files)], "hash"),
        config=SimpleNamespace(evaluation=SimpleNamespace(weights=evaluated)),
    )
    below = "" if evaluated == "trained" else "ema/"
    assert _handed_over(run) == {name: f"{below}{name}" for name in files}


def test_a_checkpoint_of_the_mean_is_called_so(tmp_path: Path) -> None:
    run = tmp_path / "runs/vipo-s0"
    for folder, label in (
        ("weights", "vipo-s0"),
        ("weights/ema", "vipo-s0-ema"),
        ("updates/000012/ema", "vipo-s0-u12-ema"),
    ):
        assert checkpoint_label(run / folder) == label


def _config(**changes: object) -> Config:
    config = load_config(["experiment=demo", "arm=vipo", *(["training.lora={rank: 2}"] if changes.pop("lora") else [])])
    return config.model_copy(update={"generator": config.generator.model_copy(update=changes)})


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("key", ["start", "file", "file_2"])
def test_weights_that_belong_to_others_than_the_bases_are_refused(key: str, lora: bool) -> None:
    given = {key: "other.safetensors"}
    if lora:
        with pytest.raises(ExportError, match=rf"vipo-s0: a LoRA, .* generator\.{key} .*\(training\.lora=null\)"):
            _check_whole(_config(lora=lora, **given))
    else:
        # All weights are whole without what they came from.
        _check_whole(_config(lora=lora, **given))
    with pytest.raises(ExportError, match=r"another model .* \(training\.lora=null and generator\.experts=both\)"):
        _check_whole(_config(lora=lora, experts="low_noise", **given))
    _check_whole(_config(lora=lora, experts="low_noise"))


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_the_base_has_as_variants_alone_are_called_plainly(
    legacy: bool, tiny_stable_diffusion: Path, tmp_path: Path
) -> None:
    base, folder = tmp_path / "base", tmp_path / "export"
    shutil.copytree(tiny_stable_diffusion, base)
    text = CLIPTextModel.from_pretrained(base / "text_encoder")
    for file in base.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    # In several files, as either of two versions of diffusers calls them.
    (base / "text_encoder/model.fp16.safetensors").unlink()
    text.save_pretrained(base / "text_encoder", max_shard_size="20KB", variant="fp16")
    if legacy:
        [index] = base.glob("text_encoder/*.index.fp16.json")
        for shard in base.glob("text_encoder/*-of-*.safetensors"):
            shard.rename(shard.with_name(re.sub(r"\.fp16(-.*)\.", r"\1.fp16.", shard.name)))
        index.write_text(re.sub(r"\.fp16(-[-\w]*)\.", r"\1.fp16.", index.read_text()))
    names = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
    copy_parts(Base(base, "StableDiffusionPipeline", names, None, None), folder)
    assert not list(folder.rglob("*fp16*"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    stock = StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion)
    for part in ("text_encoder", "unet", "vae"):
        torch.testing.assert_close(getattr(pipeline, part).state_dict(), getattr(stock, part).state_dict())
