"""How an update's cost grows with what a run chooses: curves, in seconds of the processor.

    python -m benchmarks.growth benchmarks/growth.json            # measures: two to three minutes of a processor
    python -m benchmarks.growth benchmarks/growth.json --draw docs/images/growth.svg

The demo generator and its `vipo` arm; the curve over frames is of a Wan of two heads with random weights. On a CPU with
one thread: on a GPU small sizes cost the same as larger ones, so these curves say nothing of one.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure

from benchmarks.gpu.miniatures import TINY
from benchmarks.gpu.size import family_overrides
from benchmarks.update_share import command_seconds, loaded, measure
from vipo.config.compose import load_config
from vipo.reporting.drawing import ARM_COLORS, as_plot, report_style

_DEMO = ("experiment=demo", "arm=vipo", "training.save_at=[]")
#: Rewards of drawn scenes read pictures of one size.
_ANY_SIZE = ("reward=redness", "evaluation.rewards=[redness]")
#: By curve: its name for people, and the overrides of each of its points.
CURVES: Mapping[str, tuple[str, Mapping[int, Sequence[str]]]] = MappingProxyType(
    {
        "group": (
            "samples a group, G",
            {n: [f"training.group_size={n}", "training.micro_batch=4"] for n in (4, 8, 16)},
        ),
        "steps": ("steps, T", {n: [f"sampling.steps={n}"] for n in (5, 10, 20)}),
        "trained": ("trained steps", {n: [f"training.trained_transitions={n}"] for n in (1, 4, 8)}),
        "components": ("components, K", {n: [f"perception.components={n}"] for n in (1, 3, 5)}),
        "side": (
            "pixels a side",
            {n: [*_ANY_SIZE, f"generator.height={n}", f"generator.width={n}"] for n in (32, 64, 96)},
        ),
    }
)
_FRAMES, _PROCESSES = (5, 9, 17), (1, 2)
_UPDATES = 2


def curve(name: str) -> list[dict[str, float]]:
    """Points of a curve: ``at``, and processor seconds of an update by part (``total``, ``rollout``, ...).

    Of ``processes`` the seconds are those of all processes together, with their start taken off.
    """
    if name == "processes":
        return [{"at": at, "total": _spread(at)} for at in _PROCESSES]
    if name == "frames":
        with tempfile.TemporaryDirectory() as folder:
            own = family_overrides(TINY["wan"], Path(folder), "cpu")
            return [_point(at, [*own, f"generator.frames={at}"]) for at in _FRAMES]
    return [_point(at, [*_DEMO, *overrides]) for at, overrides in CURVES[name][1].items()]


def _point(at: int, overrides: Sequence[str]) -> dict[str, float]:
    with loaded(load_config(list(overrides))) as setup:
        figures = measure(setup, _UPDATES)
    parts = {name.removeprefix("time/"): round(value, 4) for name, value in figures["parts"].items()}
    return {"at": at, "total": round(figures["cpu_seconds_per_update"], 4), **parts}


def _spread(processes: int) -> float:
    """Processor seconds of an update of `vipo train` in so many processes: two lengths of a run, their difference."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for updates in (1, 1 + _UPDATES):
            own = [
                f"training.updates={updates}",
                f"distribution.processes={processes}",
                "training.micro_batch=4",
                "tracking.sheet_every=1000",
            ]
            command = [sys.executable, "-m", "vipo.cli", "train", *_DEMO, *own]
            command += ["--results", str(Path(folder) / str(updates))]
            seconds.append(command_seconds(command))
    return round((seconds[1] - seconds[0]) / _UPDATES, 4)


def draw(figures: Mapping[str, list[dict[str, float]]]) -> str:
    """The curves as one SVG, a plot each."""
    titles = {name: title for name, (title, _) in CURVES.items()} | {
        "frames": "frames",
        "processes": "processes",
    }
    with report_style():
        figure = Figure(figsize=(6.6, 3.4), layout="constrained")
        plots = figure.subplots(2, -(-len(figures) // 2), sharey=True, squeeze=False).flatten().tolist()
    for axes in plots[len(figures) :]:
        axes.set_axis_off()
    for place, (axes, (name, points)) in enumerate(zip(plots, figures.items(), strict=False)):
        at = [point["at"] for point in points]
        for number, part in enumerate(part for part in ("total", "rollout", "learn", "map") if part in points[0]):
            values = [point[part] for point in points]
            axes.plot(at, values, color=ARM_COLORS[number + 1], marker="osD^"[number], markersize=3, label=part)
        axes.set_xlabel(titles[name])
        axes.set_xticks(at)
        axes.set_ylim(bottom=0)
        if place == 0:
            axes.legend(frameon=False, fontsize=6)
    figure.supylabel("processor seconds an update", fontsize=8)
    told = "Processor seconds of an update against " + ", ".join(titles[name] for name in figures)
    return as_plot(figure, "growth", "growth", "How an update's cost grows", "", told).standalone()


def main() -> None:
    """Measure into a file, or draw what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--draw", type=Path, metavar="SVG")
    parser.add_argument("--only", nargs="+", default=[*CURVES, "frames", "processes"])
    arguments = parser.parse_args()
    told: dict[str, Any] = {"curves": {}}
    if arguments.file.is_file():
        told = json.loads(arguments.file.read_text(encoding="utf-8"))
    if arguments.draw is not None:
        arguments.draw.write_text(draw(told["curves"]), encoding="utf-8")
        return
    for name in arguments.only:
        told["curves"][name] = curve(name)
        # After each: whatever ends the run, what was measured stays.
        arguments.file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
