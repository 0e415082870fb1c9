"""The figure of a measurement of credit: each source's ratio to the first, by estimator and direction."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from vipo.credit.meter.result import Along, Result
from vipo.reporting.drawing import ARM_COLORS, INK, WIDTH, Plot, add_legend, as_plot, bare_rows, new_row

_KINDS = {"sgd": ("o", ARM_COLORS[1]), "sign": ("s", ARM_COLORS[2]), "optimizer": ("D", ARM_COLORS[3])}
_ROW, _APART = 0.42, 0.2


def draw_credit(result: Result, confidence: float = 0.95) -> Plot:
    """Ratios with their intervals, one row a source, one panel an estimator; wide intervals reach the edge."""
    panels = [
        (title, found)
        for title, found in (
            ("cosine with the gradient, relative", result.pathwise),
            ("gain of one step, relative", result.directional),
        )
        if found
    ]
    sources = list(dict.fromkeys(along.source for along in panels[0][1]))
    figure, grid = new_row(len(panels), 0.8 + _ROW * len(sources), WIDTH * len(panels))
    for axes, (title, found) in zip(grid, panels, strict=True):
        _panel(axes, found, sources)
        axes.set_xlabel(f"{title} to {result.first}")
    grid[0].set_yticks(range(len(sources)), sources)
    grid[0].set_ylim(len(sources) - 0.5, -0.5)
    kinds = list(dict.fromkeys(along.kind for _, found in panels for along in found))
    add_legend(
        figure,
        [Line2D([], [], color=_KINDS[kind][1], marker=_KINDS[kind][0], markersize=4, label=kind) for kind in kinds],
    )
    told = "; ".join(
        f"{title}: " + ", ".join(f"{along.source} {along.kind} {along.ratio.value:.2f}" for along in found)
        for title, found in panels
    )
    measured = f"{result.updates} updates, {result.reference_batches} reference batches"
    caption = f"{measured}; bars are {100 * confidence:g} % intervals"
    return as_plot(figure, "credit", "credit", "What each source's direction is worth", caption, f"{told}.")


def _panel(axes: Axes, found: Sequence[Along], sources: Sequence[str]) -> None:
    kinds = list(dict.fromkeys(along.kind for along in found))
    for along in found:
        marker, color = _KINDS[along.kind]
        row = sources.index(along.source) + _APART * (kinds.index(along.kind) - (len(kinds) - 1) / 2)
        if along.ratio.low is not None and along.ratio.high is not None:
            axes.plot([along.ratio.low, along.ratio.high], [row, row], color=color, linewidth=1.6)
        axes.plot(along.ratio.value, row, marker=marker, color=color, markersize=4)
    # By the estimates: one interval that says nothing would hide all others.
    known = [along.ratio.value for along in found if math.isfinite(along.ratio.value)]
    axes.set_xlim(min([-0.5, *known]) - 0.2, 1.6 * max([1.25, *known]))
    axes.axvline(1, color=INK, linewidth=0.8, alpha=0.55, dashes=(3, 2))
    bare_rows(axes)
