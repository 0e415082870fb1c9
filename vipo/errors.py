"""The errors that a user can mend: the command line prints them without a traceback."""


class VipoError(Exception):
    """Something outside the code is wrong; the message names the file or key and the fix."""


class Preempted(VipoError):
    """A signal asked the process to stop; everything needed to go on exactly is in the newest checkpoint."""

    #: Exit status by which a scheduler tells what can be tried again: EX_TEMPFAIL of sysexits.h.
    STATUS = 75
