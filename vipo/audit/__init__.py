"""`vipo audit`: are these results what they claim to be, and would they come out again?"""

from vipo.audit.audit import AuditError, audit_experiment
from vipo.audit.findings import Anchor, Audit, Finding

__all__ = ["Anchor", "Audit", "AuditError", "Finding", "audit_experiment"]
