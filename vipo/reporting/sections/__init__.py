"""The page's sections in order: one file and one template each, and one line here."""

from collections.abc import Callable

from vipo.reporting.sections.alarms import alarms
from vipo.reporting.sections.change import change
from vipo.reporting.sections.comparison import comparison
from vipo.reporting.sections.configuration import configuration
from vipo.reporting.sections.context import Page, Section
from vipo.reporting.sections.credit import credit
from vipo.reporting.sections.extremes import extremes
from vipo.reporting.sections.files import files
from vipo.reporting.sections.matched import matched
from vipo.reporting.sections.progress import progress
from vipo.reporting.sections.provenance import provenance
from vipo.reporting.sections.published import published
from vipo.reporting.sections.result import result
from vipo.reporting.sections.run import run
from vipo.reporting.sections.samples import samples
from vipo.reporting.sections.time import time
from vipo.reporting.sections.training import training

#: Each returns None where it has nothing to show.
SECTIONS: tuple[Callable[[Page], Section | None], ...] = (
    result,
    progress,
    samples,
    extremes,
    comparison,
    published,
    matched,
    change,
    credit,
    training,
    alarms,
    time,
    run,
    configuration,
    provenance,
    files,
)
