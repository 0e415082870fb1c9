"""`vipo check`: whether an experiment can start here, and what to do where it cannot."""

from vipo.check.experiment import check_experiment
from vipo.check.line import Line

__all__ = ["Line", "check_experiment"]
