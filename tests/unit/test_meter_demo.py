"""The registered measurement `meter_demo`: its cells, and its table from made-up results."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from vipo.config.compose import load_config, repository_root
from workflow import meter_demo
from workflow.meter_demo import PREDICTIONS, RUN, Cell, cells, kept, measure, predictions, table, write

ROOT = repository_root()


def _result(cell: Cell, ratio: float, low: float = 0.01) -> str:
    def along(source: str, kind: str, ratio: float) -> dict[str, object]:
        value = {"value": 0.03 * ratio, "error": 0.01, "low": low, "high": 0.05, "update_share": 0.5}
        return {"source": source, "kind": kind, "value": value, "ratio": value | {"value": ratio, "error": 0.2 * ratio}}

    found = [along(source, "sgd", 1 if source == "grpo" else ratio) for source in ("grpo", "contrast", "oracle")]
    pathwise = [] if cell.name.startswith("scene") else found
    return json.dumps(
        {"overrides": cell.overrides, "result": {"first": "grpo", "pathwise": pathwise, "directional": found}}
    )


def test_every_cell_is_one_change_of_a_configuration_that_holds() -> None:
    every = list(cells())
    assert len(every) == len({cell.name for cell in every}) <= 25
    assert {name for _, *pair in PREDICTIONS.values() for name in pair} <= {cell.name for cell in every}
    first = load_config([*RUN, "arm=grpo"])
    assert set(first.experiment.meter.arms) <= set(first.experiment.arms)
    for cell in {cell.folder: cell for cell in every}.values():
        config = load_config([*RUN, "arm=grpo", *cell.overrides])
        meter = config.experiment.meter
        differing = {
            name
            for name in ("reward", "prompts", "training", "perception", "sampling", "optimizer", "generator")
            if getattr(config, name) != getattr(first, name)
        }
        assert len(differing) == (0 if cell.folder == "object_redness" else 2 if cell.folder == "scene" else 1)
        # The reference has as many samples in every cell.
        assert meter.reference * config.training.group_size in (0, 256)
        assert meter.updates * config.training.prompts_per_update >= 32


def test_the_table_and_the_predictions(tmp_path: Path) -> None:
    every = list(cells())
    ratios = {cell.name: 1 + 0.1 * place for place, cell in enumerate(every)}
    (tmp_path / "meter_demo").mkdir()
    for cell in every[:-1]:
        kept(cell, tmp_path).write_text(_result(cell, ratios[cell.name]))
    write(table(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["meter_demo.csv"], "one is not measured yet"
    kept(every[-1], tmp_path).write_text(_result(every[-1], ratios[every[-1].name]))
    found = table(tmp_path)
    assert len(found) == 3 * (2 * len(every) - 3)
    told = predictions(found).set_index("prediction")
    raw = {}
    for name, (source, larger, smaller) in PREDICTIONS.items():
        z = math.log(ratios[larger] / ratios[smaller]) / (0.2 * math.sqrt(2))
        raw[name] = 2 * stats.norm.sf(abs(z))
        assert told.loc[name, "p"] == pytest.approx(raw[name])
        assert told.loc[name, "source"] == source
    assert told["holm"].min() == pytest.approx(min(1, len(raw) * min(raw.values())))
    write(found, tmp_path / "out")
    assert (tmp_path / "out/meter_demo_predictions.csv").is_file()
    drawn = (tmp_path / "out/meter_demo.svg").read_text()
    assert all((f">{cell.name}<" in drawn) == (cell.folder != "scene") for cell in every)
    # Where GRPO's own value cannot be told from zero the cell says nothing, of predictions too.
    group_4 = next(cell for cell in every if cell.name == "group_4")
    kept(group_4, tmp_path).write_text(_result(group_4, 9.0, low=-0.01))
    untold = predictions(table(tmp_path)).set_index("prediction")
    assert (untold.loc["smaller groups", "p"], math.isnan(untold.loc["smaller groups", "log_ratio"])) == (1, True)
    for name in ("smaller objects", "a local reward", "fewer groups"):
        assert untold.loc[name, "p"] == pytest.approx(raw[name])


def test_a_cell_is_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = next(cell for cell in cells() if cell.checkpoint != "base")
    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> None:
        ran.append(command)
        cell.found(tmp_path / "results").parent.mkdir(parents=True, exist_ok=True)
        cell.found(tmp_path / "results").write_text('{"result": 1}')
        record = cell.found(tmp_path / "results").parent / "provenance.json"
        record.write_text('{"git": {"commit": "abc"}}')

    monkeypatch.setattr(meter_demo.subprocess, "run", run)
    for _ in range(2):
        measure(cell, tmp_path / "results", tmp_path / "out")
    assert [command[:2] for command in ran] == [["vipo", "train"], ["vipo", "credit"]]
    weights = tmp_path / "results/object_redness/meter_demo/runs/grpo-s300/updates/000006"
    assert ran[1][-2:] == ["--weights", str(weights)]
    told = json.loads(kept(cell, tmp_path / "out").read_text())
    assert told == {"commit": "abc", "overrides": list(cell.overrides), "result": 1}
    # What is kept under a cell's name and is of another is neither believed nor lost.
    kept(cell, tmp_path / "out").write_text(json.dumps(told | {"overrides": ["prompts=large"]}))
    with pytest.raises(ValueError, match=f"{cell.name}.json: was measured with other overrides"):
        measure(cell, tmp_path / "results", tmp_path / "out")


def test_the_page_tells_what_was_measured(tmp_path: Path) -> None:
    registered = ROOT / "docs/registered"
    found = table(registered)
    write(found, tmp_path)
    for name in ("meter_demo.csv", "meter_demo_predictions.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name), pd.read_csv(registered / name), rtol=1e-4)
    page = (ROOT / "docs/registered.md").read_text(encoding="utf-8")
    result = " ".join(page.partition("## `meter_demo`")[2].partition("\n## ")[0].partition("**Result**")[2].split())
    sgd = found[(found["estimator"] == "pathwise") & (found["direction"] == "sgd")]
    ratios = sgd.set_index(["cell", "source"])["ratio"]
    predicted = predictions(found)
    rows = re.findall(r"\| ([a-z ]+) \| `(\w+)` \| `(\w+)` ([\d.]+)[^|]* \| `(\w+)` ([\d.]+) \| ([^|]+) \|", result)
    assert [row[0] for row in rows] == predicted["prediction"].tolist()
    for row, (_, told) in zip(rows, predicted.iterrows(), strict=True):
        assert (row[1], row[2], row[4]) == (told["source"], told["larger"], told["smaller"])
        for cell, value in (row[2:4], row[4:6]):
            assert f"{ratios[cell, row[1]]:.2f}" == value
        tested = f"{told['log_ratio']:+.2f} ({told['error']:.2f})".replace("0.", ".", 2)
        assert row[6] == (tested if told["p"] < 1 else "not tested")
    able = sgd[sgd["grpo_told"]]
    assert (able["cell"].nunique(), sgd["cell"].nunique()) == (16, 17)
    ranges = re.findall(r"`(\w+)` (\d\.\d+) to (\d\.\d+), (\d+)", result)
    assert [source for source, *_ in ranges] == ["contrast", "oracle", "product", "vipo"]
    for source, low, high, above in ranges:
        own = able[able["source"] == source]
        assert (f"{own['ratio'].min():.2f}", f"{own['ratio'].max():.2f}") == (low, high), source
        assert (own["low"] > 1).sum() == int(above), source
    control = able[able["source"] == "shuffled_contrast"]
    assert ((control["high"] < 1).sum(), (control["low"] > 1).sum()) == (10, 0)
    directional = found[(found["estimator"] == "directional") & (found["source"] == "grpo")]
    assert f"in {(~directional['grpo_told']).sum()} of {len(directional)} places" in result
