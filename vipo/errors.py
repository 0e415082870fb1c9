"""The one base of errors that a user can mend: the command line prints them without a traceback."""


class VipoError(Exception):
    """Something outside the code is wrong; the message names the file or key and the fix."""
