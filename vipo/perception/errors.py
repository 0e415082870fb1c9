"""What can go wrong with a backbone."""

from vipo.errors import VipoError


class PerceptionError(VipoError):
    """A backbone cannot be loaded or used; the message names the configuration key and the fix."""
