"""Signs of reward hacking against explicit loops, and the bounds that stop a run."""

import colorsys
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from vipo.config.alarms import SIGNS, AlarmConfig, AlarmsConfig
from vipo.config.compose import load_config
from vipo.config.validation import ConfigError
from vipo.reporting.sections.alarms import alarms
from vipo.training.alarms import AlarmRaised, Alarms, alarm_metrics, group_diversity, picture_signs, thumbnails
from vipo.training.errors import TrainingError


def looped(frames: np.ndarray) -> list[float]:  # type: ignore[type-arg]
    """The signs of ``(T, 3, H, W)``, pixel by pixel."""
    dark = bright = edges = pairs = 0
    saturations, cells = [], {}
    for frame in frames:
        _, height, width = frame.shape
        luma = [
            [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in zip(*rows, strict=True)]
            for rows in zip(*frame, strict=True)
        ]
        for y, x in itertools.product(range(height), range(width)):
            color = tuple(float(c) for c in frame[:, y, x])
            dark += luma[y][x] < 0.05
            bright += luma[y][x] > 0.95
            saturations.append(colorsys.rgb_to_hsv(*color)[1])
            cell = tuple(min(3, int(c * 4)) for c in color)
            cells[cell] = cells.get(cell, 0) + 1
            if y < height - 1 and x < width - 1:
                pairs += 1
                edges += max(abs(luma[y][x + 1] - luma[y][x]), abs(luma[y + 1][x] - luma[y][x])) > 0.1
    total = len(saturations)
    entropy = -sum(n / total * math.log2(n / total) for n in cells.values())
    return [dark / total, bright / total, edges / pairs, entropy, sum(saturations) / total]


def drawn(*shape: int) -> torch.Tensor:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    # Some of it black, some of it white.
    return torch.where(values < 0.2, 0.0, torch.where(values > 0.8, 1.0, values))


@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (2, 3, 3, 7, 9)])
def test_signs_are_what_loops_count(shape: tuple[int, ...]) -> None:
    pictures = drawn(*shape)
    pictures[0, ..., :3, :4] = pictures[0, ..., :1, :1]
    found = picture_signs(pictures)
    for row, sample in zip(found.tolist(), pictures.double().numpy(), strict=True):
        assert row == pytest.approx(looped(sample if sample.ndim == 4 else sample[None]), abs=1e-6)
    assert torch.equal(picture_signs(pictures[1:]), found[1:])


def test_signs_of_what_hacks() -> None:
    black, white, red = torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
    red[0] = 1
    bad = torch.full((3, 8, 8), torch.nan)
    board = (torch.arange(8)[:, None] + torch.arange(8)[None]).remainder(2).float().expand(3, 8, 8)
    found = picture_signs(torch.stack([black, white, red, bad, board]))
    named = [dict(zip(SIGNS, row, strict=True)) for row in found.tolist()]
    assert [row["dark_share"] for row in named] == [1, 0, 0, 1, 0.5]
    assert [row["bright_share"] for row in named] == [0, 1, 0, 0, 0.5]
    assert [row["saturation"] for row in named] == [0, 0, 1, 0, 0]
    assert [row["edge_density"] for row in named] == [0, 0, 0, 0, 1]
    assert [row["colour_entropy"] for row in named] == [0, 0, 0, 0, 1]
    # Large pictures are averaged first.
    assert torch.equal(picture_signs(torch.ones(1, 3, 600, 300)), found[1:2])


def test_diversity_is_of_pairs_within_groups() -> None:
    pictures, groups = drawn(5, 3, 20, 24), torch.tensor([0, 1, 0, 1, 0])
    small = thumbnails(pictures)
    assert small.shape == (5, 3 * 16 * 16)
    apart = []
    for group in (0, 1):
        own = [small[i].numpy() for i in range(5) if groups[i] == group]
        apart.append(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in itertools.combinations(own, 2)]))
    assert group_diversity(small, groups) == pytest.approx(float(np.mean(apart)))
    assert group_diversity(small[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])) == 0
    metrics = alarm_metrics(picture_signs(pictures), small, groups)
    assert sorted(metrics) == sorted([*(f"alarm/{name}" for name in SIGNS), "alarm/group_diversity"])


def rows(*values: float) -> list[dict[str, float]]:
    return [{"update": number + 1, "alarm/dark_share": value} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("bound", "values", "stops"),
    [
        ({"above": 0.5}, (0.1, 0.5, 0.6), 3),
        ({"above": 0.5, "updates": 2}, (0.6, 0.4, 0.6, 0.7, 0.1), 4),
        ({"below": 0.2}, (0.3, 0.1), 2),
        ({"above": 0.3, "against_first": True}, (0.4, 0.6, 0.75), 3),
        ({"below": -0.3, "above": 0.3, "against_first": True}, (0.4, 0.05), 2),
        ({"above": 0.5}, (0.1, math.nan), 2),
        ({"above": 0.5}, (0.1, 0.2), None),
    ],
)
def test_bounds_stop_at_the_update_that_breaks_them(
    bound: dict[str, float], values: tuple[float, ...], stops: int | None
) -> None:
    bounds = [AlarmConfig(metric="alarm/dark_share", **bound)]  # type: ignore[arg-type]
    alarms, stopped = Alarms(bounds), None
    for row in rows(*values):
        alarms.see(row)
        try:
            alarms.check()
        except AlarmRaised as error:
            stopped = int(row["update"])
            assert f"alarm/dark_share is {row['alarm/dark_share']:.6g} after update {stopped}" in str(error)  # noqa: PT017
            break
    assert stopped == stops
    if stops is not None:
        # Resumed, it stops again at once; under a wider bound it goes on.
        with pytest.raises(AlarmRaised):
            Alarms(bounds, rows(*values[:stops])).check()
        Alarms([AlarmConfig(metric="alarm/dark_share", above=1e6)], rows(*(v for v in values if v == v))).check()


def test_what_is_no_metric_is_told_at_the_first_update() -> None:
    with pytest.raises(TrainingError, match="there is no metric 'x'; choose one of alarm/dark_share"):
        Alarms([AlarmConfig(metric="x", above=1)]).see(rows(0.0)[0])


def test_bounds_that_hold_nothing_are_refused() -> None:
    for wrong, told in (({}, "give above, below or both"), ({"above": 1.0, "below": 2.0}, "leave no value between")):
        with pytest.raises(ValidationError, match=told):
            AlarmsConfig.model_validate({"stop": [{"metric": "m", **wrong}]})


def test_the_report_shows_first_and_last() -> None:
    class Term:
        label, weight = "<b>", 0.0

    class Config:
        class reward:  # noqa: N801
            terms = (Term,)

    class Run:
        def __init__(self, name: str, metrics: pd.DataFrame) -> None:
            self.name, self.metrics, self.config = name, metrics, Config

    class Experiment:
        runs = (
            Run("base-s0", pd.DataFrame()),
            Run("grpo-s0", pd.DataFrame({"alarm/dark_share": [0.25, 0.5], "reward/<b>/mean": [1.0, 2.0]})),
        )

    class Page:
        experiment = Experiment

    section = alarms(Page)  # type: ignore[arg-type]
    assert section is not None
    assert section.values["labels"][-1] == "<b> (not rewarded)"
    (row,) = section.values["rows"]
    assert row["run"] == "grpo-s0"
    assert row["cells"][0] == (0.25, 0.5)
    assert row["cells"][-1] == (1.0, 2.0)
    assert "distance to the base" not in section.values["labels"]
    Experiment.runs = (Run("grpo-s0", pd.DataFrame({"alarm/base_distance": [0.5, 2.0]})),)  # type: ignore[assignment]
    section = alarms(Page)  # type: ignore[arg-type]
    assert section is not None
    place = section.values["labels"].index("distance to the base")
    assert section.values["rows"][0]["cells"][place] == (0.5, 2.0)
    Experiment.runs = (Run("old-s0", pd.DataFrame({"loss": [1.0]})),)  # type: ignore[assignment]
    assert alarms(Page) is None  # type: ignore[arg-type]


def test_a_bound_on_what_no_update_has_is_refused_before_the_first() -> None:
    bound = "alarms.stop=[{metric: alarm/base_distance, above: 0.1}]"
    load_config(["experiment=demo", "training.base_distance=true", bound])
    demo = ["experiment=demo", "reward.terms=[redness, {name: scene, label: seen, weight: 0.0}]"]
    for name in ("alarm/group_diversity", "reward/seen/mean", "loss", "distance/reference"):
        load_config([*demo, f"alarms.stop=[{{metric: {name}, above: 1}}]"])
    for name, told in (
        (
            "alarm/dark_shar",
            "there is no metric 'alarm/dark_shar'; choose one of alarm/bright_share, .*reward/seen/mean",
        ),
        ("reward/scene/mean", "there is no metric 'reward/scene/mean'"),
        ("change/total", "'change/total' is measured by evaluations, after a run; bound alarm/base_distance"),
        ("alarm/base_distance", "'alarm/base_distance' is measured where training.base_distance is true"),
    ):
        with pytest.raises(ConfigError, match=f"alarms.stop: {told}"):
            load_config([*demo, f"alarms.stop=[{{metric: {name}, above: 1}}]"])
