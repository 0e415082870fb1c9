"""Of a run with a mean of its weights, what is handed over is what was evaluated."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vipo.config.compose import load_config
from vipo.config.run import Config
from vipo.handover.export import ExportError, _check_whole, _handed_over
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
