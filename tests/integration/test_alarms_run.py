"""A run that stops itself on a bound, and goes on under a wider one as if nothing had been."""

import json
import shutil
from pathlib import Path

import pytest

from vipo.config.compose import load_config, repository_root
from vipo.stages import train_stage
from vipo.training.alarms import AlarmRaised


def test_a_run_stops_on_its_bound_and_goes_on_under_another(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    root = repository_root()
    common = [*tiny_overrides, "arm=grpo", "training.save_at=[]", "training.updates=3", "training.checkpoint_every=5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for results in (whole, cut):
        shutil.copytree(prepared, results)
    train_stage(load_config(common), root, whole)
    metrics = whole / "demo/runs/grpo-s0/metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(0 <= row["alarm/saturation"] <= 1 and row["alarm/group_diversity"] > 0 for row in rows)

    bound = "alarms.stop=[{metric: alarm/colour_entropy, above: -1.0, updates: 2}]"
    for _ in range(2):
        # The second time at once, with the same checkpoint.
        with pytest.raises(AlarmRaised, match=r"alarm/colour_entropy is .* after update 2, .*above -1, for 2 in a row"):
            train_stage(load_config([*common, bound]), root, cut)
        run = cut / "demo/runs/grpo-s0"
        assert [path.name.lstrip("0") for path in (run / "checkpoints").iterdir()] == ["2"]
        assert not (run / "weights").exists()
    train_stage(load_config([*common, bound.replace("-1.0", "9.0")]), root, cut)
    assert (run / "metrics.jsonl").read_bytes() == metrics.read_bytes()
    weights = "weights/transformer/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (metrics.parent / weights).read_bytes()
