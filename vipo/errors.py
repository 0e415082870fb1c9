"""The errors that a user can mend: the command line prints them without a traceback."""


class VipoError(Exception):
    """Something outside the code is wrong; the message names the file or key and the fix."""

    #: Whether it tells of an exception in code that is not vipo's, whose traceback its author needs.
    foreign = False


class InternalError(VipoError):
    """A fault of vipo itself; the message says where it came from."""


class Interrupted(VipoError):
    """Ctrl-C."""

    #: Exit status of a process that SIGINT ended, by the shells' rule.
    STATUS = 130


class Preempted(VipoError):
    """A signal asked the process to stop; everything needed to go on exactly is in the newest checkpoint."""

    #: Exit status by which a scheduler tells what can be tried again: EX_TEMPFAIL of sysexits.h.
    STATUS = 75
