"""What a section of the page reads, and what it gives: a heading, a template and the template's values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from markupsafe import Markup

from vipo.reporting.drawing import Plot
from vipo.reporting.gallery import Gallery
from vipo.reporting.inputs import Experiment
from vipo.reporting.summary import Summary


@dataclass(frozen=True)
class Page:
    """Everything that a page is made of. Sections read it and nothing else.

    Attributes:
        live: whether training may still run: `vipo report --watch`.
    """

    experiment: Experiment
    summary: Summary
    figures: Sequence[Plot]
    time: pd.DataFrame
    time_figure: Plot | None
    gallery: Gallery
    live: bool = False

    @property
    def root(self) -> str:
        """The way from the page's file to the experiment's folder."""
        return "" if self.live else "../"

    def drawn(self, group: str) -> list[dict[str, Any]]:
        """The figures of one group, for the macro `figure`."""
        return [drawn(plot) for plot in self.figures if plot.group == group]


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        anchor: its `id`, and where its link in the page's navigation leads; the file
            ``templates/sections/<anchor>.html.j2`` is its body.
        title: its heading and the text of that link.
        values: what the template reads.
    """

    anchor: str
    title: str
    values: Mapping[str, Any] = field(default_factory=dict)


def drawn(plot: Plot) -> dict[str, Any]:
    """A figure for the macro `figure`; drawings are the page's only trusted markup."""
    return {"title": plot.title, "caption": plot.caption, "svg": Markup(plot.inline)}
