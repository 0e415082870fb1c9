"""Credit sources: where in a sample its advantage goes. Plug-ins, one file each."""

from vipo.credit.assign import Credit, assign_credit, load_sources, source_inputs
from vipo.credit.costs import Costs
from vipo.credit.source import Context, CreditError, CreditSource, Samples, Weights

__all__ = [
    "Context",
    "Costs",
    "Credit",
    "CreditError",
    "CreditSource",
    "Samples",
    "Weights",
    "assign_credit",
    "load_sources",
    "source_inputs",
]
