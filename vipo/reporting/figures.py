"""The report's figures: held-out samples, training, time."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from vipo.reporting.drawing import (
    INK,
    PART_COLORS,
    WIDTH,
    Arms,
    Plot,
    add_legend,
    as_plot,
    bare_rows,
    new_figure,
    report_style,
)
from vipo.reporting.summary import METRICS, Summary


def draw_figures(summary: Summary) -> list[Plot]:
    """All deterministic figures of a report."""
    return [*draw_comparison(summary), *draw_training(summary, list(summary.arms["arm"]))]


def draw_comparison(summary: Summary) -> list[Plot]:
    """The figures of held-out samples."""
    arms = Arms(list(summary.arms["arm"]))
    figures = [_forest(summary, arms, column, number) for number, column in enumerate(_rewards(summary))]
    figures += [
        plot for number, column in enumerate(summary.trained) for plot in _held_out(summary, arms, column, number)
    ]
    if {"change/foreground", "change/background"} <= summary.columns.keys():
        figures.append(_change(summary, arms))
    return figures


def draw_training(summary: Summary, names: Sequence[str]) -> list[Plot]:
    """The training metrics that moved, over updates; `names` are all arms in order, whose colours they have."""
    arms = Arms(list(names))
    drawn = (metric for metric in METRICS if metric not in summary.flat)
    figures = [plot for metric in drawn if (plot := _metric(summary, arms, metric)) is not None]
    if len(summary.clip_by_step):
        figures.append(_clip_by_step(summary, arms))
    return figures


def draw_time(time: pd.DataFrame) -> Plot:
    """Stacked bars of the mean seconds of an update, one bar a run."""
    parts = time_parts(time)
    figure, axes = new_figure(0.75 + 0.24 * len(time), width=2 * WIDTH)
    left = pd.Series(0.0, index=time.index)
    for part, color in zip(parts, _cycle(PART_COLORS, len(parts)), strict=True):
        axes.barh(time["run"], time[part], left=left, color=color, height=0.66, label=part, linewidth=0)
        left = left + time[part]
    axes.invert_yaxis()
    axes.set_xlabel("seconds per update")
    bare_rows(axes)
    add_legend(figure, axes.get_legend_handles_labels()[0])
    listed = "; ".join(f"{row.run} {row.total:.2f} s" for row in time.itertuples())
    return as_plot(
        figure, "time", "time", "Time of an update", "Mean over all updates.", f"Seconds per update: {listed}."
    )


def time_parts(time: pd.DataFrame) -> list[str]:
    """The parts of an update in a time table, in order."""
    return [str(name) for name in time.columns if name not in ("run", "arm", "updates", "total", "peak_bytes")]


def _rewards(summary: Summary) -> list[str]:
    return [column for column in summary.columns if column.startswith("reward/")]


def _forest(summary: Summary, arms: Arms, column: str, number: int) -> Plot:
    references = [name for name in ("base", "grpo") if len(summary.final(column, name))]
    heights = [len(summary.final(column, name)) for name in references]
    with report_style():
        figure = Figure(figsize=(WIDTH, 0.62 * len(heights) + 0.235 * sum(heights)), layout="constrained")
        grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=[height + 0.6 for height in heights])
    means = dict(zip(summary.arms["arm"], summary.arms[column], strict=True))
    for axes, reference in zip(grid[:, 0], references, strict=True):
        items = summary.final(column, reference)
        for row, (arm, item) in enumerate(items.items()):
            color, mark = arms.color(arm), arms.mark(arm)
            axes.plot([item.low, item.high], [row, row], color=color, linewidth=2.2, solid_capstyle="round", gid=mark)
            axes.plot(item.estimate, row, marker=arms.marker(arm), color=color, markersize=5.2, gid=mark, label=arm)
            _points(axes, _final_seeds(summary, arm, column) - means[reference], row, color)
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.55, dashes=(3, 2))
        axes.set_yticks(range(len(items)), list(items))
        axes.set_ylim(len(items) - 0.4, -0.6)
        axes.set_xlabel(f"difference to {reference}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        bare_rows(axes)
    texts = [
        f"{item.arm} against {reference} {item.estimate:+.3g} ({item.low:+.3g} to {item.high:+.3g})"
        for reference in references
        for item in summary.final(column, reference).values()
    ]
    kind = "trained" if column in summary.trained else "measured, never rewarded"
    return as_plot(figure, f"difference-{number}", "forest", summary.columns[column], kind, "; ".join(texts) + ".")


def _held_out(summary: Summary, arms: Arms, column: str, number: int) -> list[Plot]:
    """One trained reward over updates and over change, and the side effects over it."""
    name = summary.columns[column]
    others = [key for key in _rewards(summary) if key not in summary.trained]
    return [
        _path(
            summary, arms, ("update", "update"), (column, name), f"held-out-update-{number}", "held_out",
            f"Held-out {name} over updates", "evaluated weights; the base is update 0",
        ),
        _path(
            summary, arms, ("change/total", "change against the base"), (column, name), f"held-out-change-{number}",
            "held_out", f"Held-out {name} over change", "mean absolute pixel difference to the base",
        ),
        *(
            _path(
                summary, arms, (column, name), (other, summary.columns[other]), f"side-effect-{number}-{index}",
                "matched", f"{summary.columns[other]} over {name}", "held-out means; every path starts at the base",
            )
            for index, other in enumerate([*others, *(key for key in summary.columns if key.startswith("change/"))])
            if other != "change/total" and float(np.ptp(summary.curves[other])) > 1e-9
        ),
    ]  # fmt: skip


def _path(
    summary: Summary,
    arms: Arms,
    x: tuple[str, str],
    y: tuple[str, str],
    name: str,
    group: str,
    title: str,
    caption: str,
) -> Plot:
    """Arms as paths over their evaluated updates; `x` and `y` are a column and its label."""
    figure, axes = new_figure(2.3)
    for arm, curve in summary.curves.groupby("arm", sort=False):
        color, mark = arms.color(str(arm)), arms.mark(str(arm))
        seeds = summary.seed_curves[summary.seed_curves["arm"] == arm].groupby("seed")
        for _, own in seeds:
            axes.plot(own[x[0]], own[y[0]], color=color, linewidth=0.7, alpha=0.45, gid=mark)
        told = f"{arm}, mean of {seeds.ngroups} seeds" if seeds.ngroups > 1 else str(arm)
        axes.plot(
            curve[x[0]], curve[y[0]], color=color, marker=arms.marker(str(arm)), markersize=3.6, linewidth=1.5,
            gid=mark, label=told,
        )  # fmt: skip
    axes.set_xlabel(x[1])
    axes.set_ylabel(y[1])
    _finish(figure, axes, arms.handles(summary.curves["arm"]), integers=x[0] == "update")
    ends = ", ".join(
        f"{arm} {y[1]} {curve[y[0]].iloc[-1]:.3g} at {x[1]} {curve[x[0]].iloc[-1]:.3g}"
        for arm, curve in summary.curves.groupby("arm", sort=False)
    )
    return as_plot(figure, name, group, title, caption, f"{title}; at the end {ends}.")


def _change(summary: Summary, arms: Arms) -> Plot:
    items = [row for row in summary.arms.to_dict("records") if row["arm"] != "base"]
    figure, axes = new_figure(0.85 + 0.3 * len(items))
    for row, item in enumerate(items):
        color, places = arms.color(item["arm"]), (item["change/background"], item["change/foreground"])
        axes.plot(places, [row, row], color=color, linewidth=1.4, alpha=0.5)
        for place, filled in zip(places, (False, True), strict=True):
            axes.plot(place, row, "o", color=color, markersize=6, markerfacecolor=color if filled else "none")
        for part in ("change/foreground", "change/background"):
            _points(axes, _final_seeds(summary, item["arm"], part), row, color)
    axes.set_yticks(range(len(items)), [item["arm"] for item in items])
    axes.set_ylim(len(items) - 0.45, -0.55)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean absolute pixel difference to the base's sample")
    bare_rows(axes)
    handles = [
        Line2D([], [], color=INK, marker="o", markersize=5, linewidth=0, markerfacecolor=face, label=text)
        for text, face in (("foreground", INK), ("background", "none"))
    ]
    add_legend(figure, handles)
    listed = "; ".join(
        f"{item['arm']} foreground {item['change/foreground']:.3g}, background {item['change/background']:.3g}"
        for item in items
    )
    caption = "final weights; filled: the base picture's foreground, hollow: its background, points: seeds"
    return as_plot(figure, "change", "change", "Where the change falls", caption, f"Change against the base: {listed}.")


def _metric(summary: Summary, arms: Arms, metric: str) -> Plot | None:
    table = summary.training[summary.training["metric"] == metric]
    if table.empty:
        return None
    title, caption = METRICS[metric]
    figure, axes = new_figure(2.05)
    _curves(axes, arms, table, "update", "value")
    if metric == "log_ratio/max_before_first_step":
        axes.set_yscale("symlog", linthresh=1e-8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value else "0"))
        axes.set_ylim(bottom=0)
    axes.set_xlabel("update")
    _finish(figure, axes, arms.handles(table["arm"]), integers=True, log=metric.startswith("log_ratio"))
    last = table.groupby("arm", sort=False)["value"].last()
    listed = ", ".join(f"{arm} {value:.3g}" for arm, value in last.items())
    name = re.sub(r"[^a-z0-9]+", "-", metric)
    return as_plot(
        figure, f"training-{name}", "training", title, caption, f"{title} over updates; last values: {listed}."
    )


def _clip_by_step(summary: Summary, arms: Arms) -> Plot:
    table = summary.clip_by_step
    figure, axes = new_figure(2.05)
    _curves(axes, arms, table, "step", "share", marker=True)
    axes.set_xlabel("sampling step (0 is the noisiest)")
    axes.set_ylim(bottom=0)
    _finish(figure, axes, arms.handles(table["arm"]), integers=True)
    means = table.groupby("arm", sort=False)["share"].mean()
    listed = ", ".join(f"{arm} {value:.3g}" for arm, value in means.items())
    title = "Clipped share by sampling step"
    return as_plot(
        figure, "training-clip-by-step", "training", title, "mean over all updates", f"{title}; means: {listed}."
    )


def _curves(axes: Axes, arms: Arms, table: pd.DataFrame, x: str, y: str, marker: bool = False) -> None:
    for arm, own in table.groupby("arm", sort=False):
        color, mark = arms.color(str(arm)), arms.mark(str(arm))
        seeds = own["seed"].nunique()
        for _, run in own.groupby("seed"):
            thin = {"linewidth": 0.7, "alpha": 0.45} if seeds > 1 else {"linewidth": 1.4, "label": str(arm)}
            axes.plot(run[x], run[y], color=color, gid=mark, **thin)
        mean = own.groupby(x, sort=True)[y].mean()
        if seeds > 1:
            axes.plot(mean.index, mean, color=color, linewidth=1.6, gid=mark, label=f"{arm}, mean of {seeds} seeds")
        if marker:
            axes.plot(
                mean.index, mean, color=color, linewidth=0, marker=arms.marker(str(arm)), markersize=3.2, gid=mark
            )


def _finish(figure: Figure, axes: Axes, handles: Sequence[Line2D], *, integers: bool, log: bool = False) -> None:
    if integers:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    if not log:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        formatter = ScalarFormatter(useMathText=False, useOffset=False)
        formatter.set_powerlimits((-3, 4))
        axes.yaxis.set_major_formatter(formatter)
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.6)
    add_legend(figure, handles)


def _final_seeds(summary: Summary, arm: str, column: str) -> NDArray[np.float64]:
    table = summary.seed_means
    return table.loc[table["final"] & (table["arm"] == arm), column].to_numpy(dtype=np.float64)


def _points(axes: Axes, values: NDArray[np.float64], row: int, color: str) -> None:
    axes.plot(values, np.full(len(values), row + 0.31), ".", color=color, markersize=3.4, alpha=0.8)


def _cycle(colors: Sequence[str], count: int) -> list[str]:
    return [colors[index % len(colors)] for index in range(count)]
