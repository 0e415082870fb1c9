"""The error of every reward."""

from vipo.errors import VipoError


class RewardError(VipoError):
    """A reward that cannot be found, loaded or trusted; the message names the reward."""
