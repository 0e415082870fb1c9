"""A run that stops itself on a bound, and goes on under a wider one as if nothing had been."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vipo.config.alarms import BASE_DISTANCE
from vipo.config.compose import load_config, repository_root
from vipo.generators import load_generator
from vipo.objectives import Points
from vipo.stages import train_stage
from vipo.training import learn
from vipo.training.alarms import AlarmRaised
from vipo.training.learn import reference_predictions
from vipo.training.samples import MicroBatch
from vipo.training.setup import Setup, set_up
from vipo.training.update import update


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


def test_the_distance_to_the_base_is_measured_and_changes_nothing(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of NFT, whose KL term has its own; of the surrogate, against predictions of the generator as it lies there."""
    root, measured = repository_root(), "training.base_distance=true"
    common = [*tiny_overrides, "training.optimizer_steps_per_update=2"]
    for lora in ("seed=0", "training.lora={rank: 2, alpha: 2.0}"):
        setup = set_up(load_config([*common, "arm=nft", lora, measured]), root, prepared / "demo")
        rows = [update(setup, number) for number in (1, 2)]
        assert rows[0][BASE_DISTANCE] < rows[1][BASE_DISTANCE]
        assert [row[BASE_DISTANCE] for row in rows] == [row["distance/reference"] for row in rows]

    expected: list[float] = []

    def seen(setup: Setup, points: Sequence[Points], batch: MicroBatch) -> list[Tensor]:
        untouched = load_generator(setup.config.generator, root)
        with torch.no_grad():
            for point in points:
                base = untouched.predict(point.latents, point.times, batch.conditioning)
                new = setup.generator.predict(point.latents, point.times, batch.conditioning)
                expected.append(float(((new - base) ** 2).mean()))
        return reference_predictions(setup, points, batch)

    metrics, weights = [], []
    for more in ([], [measured]):
        if more:
            monkeypatch.setattr(learn, "reference_predictions", seen)
        setup = set_up(load_config([*common, "arm=vipo", *more]), root, prepared / "demo")
        metrics.append(update(setup, 1))
        weights.append([value.detach().clone() for value in setup.trainable.values()])
    assert metrics[1].pop(BASE_DISTANCE) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert expected[0] == 0 < expected[-1]
    assert metrics[0] == metrics[1]
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
