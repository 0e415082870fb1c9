"""Of a run with a mean of its weights, what is handed over is what was evaluated."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vipo.handover.export import _handed_over
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
