"""What training raises; light, for those who only pass it on."""

from vipo.errors import VipoError


class TrainingError(VipoError):
    """Training cannot start or go on; the message names the cause, the place and what to change."""
