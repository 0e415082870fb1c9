"""What cannot be handed over."""

from vipo.errors import VipoError


class ExportError(VipoError):
    """A run that cannot be handed over; the message names what is missing or wrong and the fix."""
