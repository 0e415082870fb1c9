"""The experiment `meter_demo` (docs/registered.md): `make meter-demo` measures its cells; killed, it goes on.

Each cell is a `vipo credit` of experiment=meter_demo with overrides of its own, in a results folder of its own. Its
``credit.json`` is kept in the repository, so that one machine may go on where another stopped.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import special

from vipo.config.meter import measured_weights, measurement_label
from vipo.evaluation.comparison import holm
from vipo.provenance.files import atomic_file
from vipo.provenance.records import PROVENANCE
from vipo.reporting.drawing import INK, WIDTH, Arms, Plot, add_legend, as_plot, bare_rows, new_row

RUN = ("experiment=meter_demo", "seed=300")
#: By directional gains alone: `scene` has no gradient, so more steps are taken along fewer kinds of direction.
_NO_GRADIENT = (
    *("experiment.meter.reference=0", "experiment.meter.updates=16", "experiment.meter.stepped=16"),
    *("experiment.meter.directions=[sgd]", "experiment.meter.held_out=24", "experiment.meter.held_out_samples=1"),
)
_PATHWISE = ("experiment.meter.stepped=0",)
REWARDS: Mapping[str, tuple[str, ...]] = {
    "object_redness": (),
    "redness": ("reward=redness",),
    "small": ("prompts=small",),
    "scene": ("reward=scene", "prompts=pairs", *_NO_GRADIENT),
}
#: What a step is taken along, as the picture names it.
_DRAWN: Mapping[str, str] = {"sgd": "ratio along the gradient", "optimizer": "ratio along the optimizer's step"}
#: As in `experiment.meter.checkpoints`; those of the run grpo-s300 are trained first.
CHECKPOINTS: Mapping[str, str] = {"base": "base", "u6": "grpo-s300@6", "u12": "grpo-s300"}
#: One at a time from object_redness at the base, whose updates are 2 groups of 8 and whose maps are of 96 pixels.
FACTORS: Mapping[str, tuple[str, ...]] = {
    "large": ("prompts=large", *_PATHWISE),
    "group_4": ("training.group_size=4", "training.micro_batch=4", "experiment.meter.reference=64", *_PATHWISE),
    "group_16": ("training.group_size=16", "experiment.meter.reference=16", *_PATHWISE),
    # The meter takes no optimizer steps of an update's parts; two would leave each fewer samples than a micro-batch.
    "groups_1": (
        *("training.prompts_per_update=1", "training.optimizer_steps_per_update=1", "experiment.meter.updates=48"),
        *_PATHWISE,
    ),
    "groups_4": ("training.prompts_per_update=4", "experiment.meter.updates=16", *_PATHWISE),
    "groups_8": ("training.prompts_per_update=8", "experiment.meter.updates=12", *_PATHWISE),
    "input_48": ("perception.input_size=48", *_PATHWISE),
    "input_192": ("perception.input_size=192", *_PATHWISE),
}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        name: of the cell, and of its table rows.
        folder: below the results, shared by cells of one training.
        overrides: of experiment=meter_demo.
        checkpoint: one of `CHECKPOINTS`.
    """

    name: str
    folder: str
    overrides: tuple[str, ...]
    checkpoint: str = "base"

    def found(self, results: Path) -> Path:
        """Where `vipo credit` writes the result."""
        return results / self.folder / "meter_demo" / "credit" / measurement_label(self.checkpoint) / "credit.json"


def cells() -> Iterator[Cell]:
    """All cells, rewards at their checkpoints first."""
    for reward, overrides in REWARDS.items():
        for name, checkpoint in CHECKPOINTS.items():
            yield Cell(f"{reward}_{name}", reward, overrides, checkpoint)
    for factor, overrides in FACTORS.items():
        yield Cell(factor, factor, overrides)


def kept(cell: Cell, output: Path) -> Path:
    """Where a cell's result stays."""
    return output / "meter_demo" / f"{cell.name}.json"


def measure(cell: Cell, results: Path, output: Path) -> None:
    """Train what the cell's checkpoint comes from where that is not done, then measure; either goes on where it was.

    A cell whose result is kept is not measured again.

    Raises:
        ValueError: what is kept is of other overrides.
        subprocess.CalledProcessError: a command failed, and has said why.
    """
    if (file := kept(cell, output)).is_file():
        _read(cell, file)
        return
    place = ["--results", str(results / cell.folder)]
    trained: list[str] = []
    if (weights := measured_weights(cell.checkpoint, results / cell.folder / "meter_demo")) is not None:
        subprocess.run(["vipo", "train", *RUN, "arm=grpo", *cell.overrides, *place], check=True)
        trained = ["--weights", str(weights)]
    subprocess.run(["vipo", "credit", *RUN, *cell.overrides, *place, *trained], check=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = cell.found(results)
    commit = json.loads((found.parent / PROVENANCE).read_text(encoding="utf-8"))["git"]["commit"]
    told = {"commit": commit, "overrides": cell.overrides, **json.loads(found.read_text(encoding="utf-8"))}
    with atomic_file(file) as path:
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _read(cell: Cell, file: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if tuple(told["overrides"]) != cell.overrides:
        raise ValueError(f"{file}: was measured with other overrides than the cell has now; remove it to measure again")
    return told


def table(output: Path) -> pd.DataFrame:
    """Ratios to GRPO of all cells that are measured.

    Returns:
        `cell`, `estimator` (pathwise, directional), `direction`, `source`, `ratio` with its standard `error`, `low` and
        `high`; `grpo`, GRPO's own value, with `grpo_error` and `grpo_told`: whether its interval leaves out zero, else
        a ratio says nothing.
    """
    rows = []
    for cell in cells():
        if not (path := kept(cell, output)).is_file():
            continue
        result: dict[str, Any] = _read(cell, path)["result"]
        for estimator in ("pathwise", "directional"):
            own = {along["kind"]: along["value"] for along in result[estimator] if along["source"] == result["first"]}
            for along in result[estimator]:
                ratio, first = along["ratio"], own[along["kind"]]
                row = {"cell": cell.name, "estimator": estimator, "direction": along["kind"], "source": along["source"]}
                row |= {"ratio": ratio["value"], **{key: ratio[key] for key in ("error", "low", "high")}}
                told = first["low"] is not None and not first["low"] <= 0 <= first["high"]
                rows.append(row | {"grpo": first["value"], "grpo_error": first["error"], "grpo_told": told})
    return pd.DataFrame(rows)


#: Registered: the first cell's ratio of the source is the larger one (pathwise, the gradient's own direction).
PREDICTIONS: Mapping[str, tuple[str, str, str]] = {
    "smaller objects": ("oracle", "small_base", "large"),
    "a local reward": ("oracle", "object_redness_base", "redness_base"),
    "smaller groups": ("contrast", "group_4", "group_16"),
    "fewer groups": ("contrast", "groups_1", "groups_8"),
}


def predictions(found: pd.DataFrame) -> pd.DataFrame:
    """The registered predictions: differences of log ratios, with two-sided normal p and Holm's correction.

    The standard error of a log ratio is the ratio's over the ratio; cells count as independent. A prediction cannot be
    tested and keeps p = 1 where a cell of it says nothing (GRPO's own value cannot be told from zero), or where its
    ratios are not both above zero, or have no errors.
    """
    sgd = found[(found["estimator"] == "pathwise") & (found["direction"] == "sgd")]
    own: Mapping[Any, Any] = sgd.set_index(["cell", "source"]).to_dict("index")
    rows: list[dict[str, Any]] = []
    for name, (source, larger, smaller) in PREDICTIONS.items():
        ratios = [float(own[cell, source]["ratio"]) for cell in (larger, smaller)]
        errors = [float(own[cell, source]["error"]) for cell in (larger, smaller)]
        told = all(bool(own[cell, source]["grpo_told"]) for cell in (larger, smaller))
        difference, error, p_value = math.nan, math.nan, 1.0
        if told and all(math.isfinite(value) for value in (*ratios, *errors)) and min(ratios) > 0:
            difference = math.log(ratios[0] / ratios[1])
            error = math.hypot(*(error / ratio for error, ratio in zip(errors, ratios, strict=True)))
            p_value = float(2 * special.ndtr(-abs(difference) / error))
        row = {"prediction": name, "source": source, "larger": larger, "smaller": smaller}
        rows.append(row | {"log_ratio": difference, "error": error, "p": p_value})
    return pd.DataFrame(rows).assign(holm=lambda frame: holm(frame["p"].tolist()))


def picture(found: pd.DataFrame) -> Plot:
    """Pathwise ratios with their intervals, a row a cell; cells whose GRPO cannot be told from zero are left out."""
    told = found[(found["estimator"] == "pathwise") & found["grpo_told"] & (found["source"] != found["source"].iloc[0])]
    names, sources = list(dict.fromkeys(told["cell"])), list(dict.fromkeys(told["source"]))
    arms = Arms([str(found["source"].iloc[0]), *sources])
    figure, panels = new_row(len(_DRAWN), 0.8 + 0.34 * len(names), 2.2 * WIDTH)
    for axes, (kind, label) in zip(panels, _DRAWN.items(), strict=True):
        for row in told[told["direction"] == kind].to_dict("records"):
            place = names.index(row["cell"]) + 0.15 * (sources.index(row["source"]) - (len(sources) - 1) / 2)
            colour = arms.color(row["source"])
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.2, solid_capstyle="round")
            axes.plot(row["ratio"], place, marker=arms.marker(row["source"]), color=colour, markersize=3.2)
        axes.axvline(1, color=INK, linewidth=0.8, alpha=0.55, dashes=(3, 2))
        axes.set_xlabel(label)
        bare_rows(axes)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    add_legend(figure, arms.handles(sources))
    title = "Cosine with the reward's gradient, over GRPO's, by cell and source of credit"
    return as_plot(figure, "meter_demo", "registered", title, "95% jackknife intervals", title)


def write(found: pd.DataFrame, output: Path) -> None:
    """``meter_demo.csv``, and where every cell is measured ``meter_demo_predictions.csv`` and ``meter_demo.svg``."""
    output.mkdir(parents=True, exist_ok=True)
    found.to_csv(output / "meter_demo.csv", index=False, lineterminator="\n", float_format="%.6g")
    if set(found["cell"]) == {cell.name for cell in cells()}:
        told = predictions(found)
        told.to_csv(output / "meter_demo_predictions.csv", index=False, lineterminator="\n", float_format="%.6g")
        with atomic_file(output / "meter_demo.svg") as path:
            path.write_text(picture(found).standalone(), encoding="utf-8")
        print(told.to_string(index=False))


def main(arguments: Sequence[str]) -> None:
    """Measure every cell below the first folder, keep them in the second and write the tables there."""
    results, output = map(Path, arguments)
    every = list(cells())
    for number, cell in enumerate(every, start=1):
        print(f"cell {number} of {len(every)}: {cell.name}", flush=True)
        measure(cell, results, output)
    write(table(output), output)


if __name__ == "__main__":
    main(sys.argv[1:])
