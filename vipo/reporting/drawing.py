"""Figures as SVG that reads on light and on dark: text in `currentColor`, arms in CSS variables with fallbacks.

Matplotlib is used through its objects and inside an `rc_context`, so nothing global changes and the
reader's own matplotlibrc has no say. The same numbers give the same bytes.
"""

import html
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

#: Arms in order, the base first; every colour has a contrast of at least 3 on white and on the page's dark ground.
ARM_COLORS = ("#7a828e", "#3877d6", "#d9591c", "#23905f", "#9657cf", "#b07a1e", "#178ea3", "#c9437f")
#: Parts of an update: rollout, learn, decode, reward, map, other, then parts that a trainer adds.
PART_COLORS = ("#2f7dbd", "#5f62d3", "#1c9484", "#c07a14", "#c4457d", "#878e99", "#7a8a1f", "#a8583a")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")

# Drawn in a colour that nothing else uses, then replaced by the reader's text colour.
INK = "#010203"
_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDTH = 3.25
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.formatter.useoffset": False,
}
_ARM_MARK = "arm-"
_STANDALONE_STYLE = "<style>svg{color:#1d2127}@media(prefers-color-scheme:dark){svg{color:#e8eaed}}</style>"


@dataclass(frozen=True)
class Plot:
    """One figure: file name, group on the page, title, caption, text alternative and SVG.

    Attributes:
        points: what the page tells under the pointer: x and y in the drawing's units, and text.
        legend: height of the legend at the drawing's foot, in its units; 0 where the page must keep it.
    """

    name: str
    group: str
    title: str
    caption: str
    alternative: str
    svg: str
    points: tuple[tuple[float, float, str], ...] = ()
    legend: float = 0.0

    @property
    def inline(self) -> str:
        """The figure for the page: without its legend, which the page shows once, and with values for the pointer."""
        opening, rest = self.svg.split(">", 1)
        if self.legend:
            left, top, width, height = re.search(r'viewBox="([^"]+)"', opening)[1].split()  # type: ignore[index]
            view = f"{left} {top} {width} {float(height) - self.legend:.6g}"
            opening = re.sub(r'viewBox="[^"]+"', f'viewBox="{view}"', opening)
        if self.points:
            points = json.dumps(self.points, ensure_ascii=False, separators=(",", ":"))
            opening += f' data-points="{html.escape(points)}"'
        return f"{opening}>{rest}"

    def standalone(self) -> str:
        """The figure as a file of its own, in ink that follows the reader's colour scheme."""
        opening, rest = self.svg.split(">", 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}>{_STANDALONE_STYLE}{rest}\n'


@dataclass(frozen=True)
class Arms:
    """Colour and marker of each arm, the same in every figure; past eight arms their pairs differ."""

    names: list[str]

    def color(self, arm: str) -> str:
        """The arm's colour."""
        return ARM_COLORS[self.names.index(arm) % len(ARM_COLORS)]

    def marker(self, arm: str) -> str:
        """The arm's marker."""
        number = self.names.index(arm)
        return _MARKERS[(number + number // len(ARM_COLORS)) % len(_MARKERS)]

    def mark(self, arm: str) -> str:
        """What a drawn line of the arm carries, so that the page can show one arm alone."""
        return f"{_ARM_MARK}{self.names.index(arm)}"

    def handles(self, shown: Iterable[str]) -> list[Line2D]:
        """Legend entries of the arms in `shown`."""
        return [
            Line2D([], [], color=self.color(arm), marker=self.marker(arm), markersize=3.2, linewidth=1.4, label=arm)
            for arm in self.names
            if arm in set(shown)
        ]


@contextmanager
def report_style(salt: str = "vipo") -> Iterator[None]:
    """Matplotlib's settings for the block, whatever the reader's are; `salt` decides an SVG's ids."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        yield


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of one plot in the reports' style; sizes in inches."""
    with report_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def new_row(count: int, height: float, width: float) -> tuple[Figure, list[Axes]]:
    """`count` plots beside each other that share their rows; sizes in inches."""
    with report_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend below the plot, in as many columns as fit."""
    # About 4.3 points a letter and 22 for the line and the gap.
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(72 * figure.get_figwidth() // (4.3 * longest + 22)))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False, fontsize=7,
        labelcolor=INK, handlelength=1.3, columnspacing=1.1, handletextpad=0.5,
    )  # fmt: skip


def bare_rows(axes: Axes) -> None:
    """Rows with names instead of a y axis."""
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.6)
    axes.set_axisbelow(True)


def as_plot(figure: Figure, name: str, group: str, title: str, caption: str, alternative: str) -> Plot:
    """`figure` as SVG that the page or a file of its own can hold; the same numbers give the same bytes."""
    stream = io.StringIO()
    metadata: Mapping[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with report_style(f"vipo {name}"):
        figure.savefig(stream, format="svg", metadata=metadata, transparent=True)
    return Plot(
        name, group, title, caption, alternative, _inline(stream.getvalue(), alternative), _values(figure, title),
        _legend_height(figure),
    )  # fmt: skip


def _values(figure: Figure, title: str) -> tuple[tuple[float, float, str], ...]:
    """What each named line's points say, where they lie in the drawing."""
    width, height = 72 * figure.get_size_inches()
    found = []
    for axes in figure.axes:
        x_label, y_label = axes.get_xlabel() or "x", axes.get_ylabel() or title
        for line in axes.lines:
            told = str(line.get_label())
            if not str(line.get_gid()).startswith(_ARM_MARK) or told.startswith("_"):
                continue
            data = np.asarray(line.get_xydata(), dtype=np.float64)
            places = figure.transFigure.inverted().transform(axes.transData.transform(data))
            for (x, y), (left, bottom) in zip(data, places, strict=True):
                says = f"{told}: {x_label} {x:.4g}" + (
                    f", {y_label} {y:.4g}" if axes.get_ylabel() or len(data) > 1 else ""
                )
                found.append((round(left * width, 1), round((1 - bottom) * height, 1), says))
    return tuple(found)


def _legend_height(figure: Figure) -> float:
    """Height of a legend of arms at the figure's foot; one of anything else stays on the page."""
    drawn = {str(line.get_gid()) for axes in figure.axes for line in axes.lines}
    if not figure.legends or not any(mark.startswith(_ARM_MARK) for mark in drawn):
        return 0.0
    bounds = figure.legends[0].get_window_extent().transformed(figure.transFigure.inverted())
    return 4 + float(bounds.y1 * 72 * figure.get_size_inches()[1])


def _inline(svg: str, alternative: str) -> str:
    """Matplotlib's file as an element for the page: scalable, labelled, coloured by the page, ids only where read."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', svg)
    if view is None:
        raise RuntimeError("matplotlib's SVG has no viewBox")
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view[1]}" '
        f'role="img" aria-label="{html.escape(alternative)}" stroke-linejoin="round">'
    )
    svg = opening + svg.split(">", 1)[1]
    svg = re.sub(rf' id="{_ARM_MARK}(\d+)"', r' data-arm="\1"', svg)
    read = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in read else "", svg)
    svg = re.sub(r"'DejaVu Sans'(, sans-serif)?", _SANS, svg)
    svg = svg.replace(INK, "currentColor")
    for index, color in enumerate(ARM_COLORS):
        svg = svg.replace(color, f"var(--arm-{index}, {color})")
    for index, color in enumerate(PART_COLORS):
        svg = svg.replace(color, f"var(--part-{index}, {color})")
    return svg
