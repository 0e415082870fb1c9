"""How a command ends: every end that is no success is a status and one message."""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from vipo.errors import InternalError, Interrupted, Preempted, VipoError
from vipo.failures import keep_traceback, where
from vipo.signals import handled
from vipo.text import Formatter, message, one_line
from vipo.training.ranks import is_rank

log = logging.getLogger(__name__)


@dataclass
class Place:
    """What a failing command's traceback is put beside."""

    results: Path | None = None


def _kept(error: BaseException, place: Place) -> str:
    path = keep_traceback(error, place.results)
    return "lost: no folder can be written" if path is None else f"in {path}"


class Commands(TyperGroup):
    """Every end of a command that is neither its own nor an error of ours becomes one."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a `Place` is its context's object."""
        ctx.obj = place = Place()
        try:
            # Where training does not listen itself, nothing is lost.
            with handled(_ask_for_another_try, signal.SIGTERM, signal.SIGUSR1):
                return super().invoke(ctx)
        except (OSError, typer.Exit, typer.Abort, typer.TyperException):
            raise
        except VipoError as error:
            if error.foreign:
                log.warning("the traceback is %s", _kept(error, place))
            raise
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; start the same command again, and it goes on where it can") from error
        except BaseException as error:
            # Status 0 is for a command that has done its work: SystemExit has not.
            raise InternalError(
                f"internal: {type(error).__name__}: {one_line(str(error), 300)} ({where(error)}); this is a fault of "
                f"vipo, please report it with the traceback, which is {_kept(error, place)}"
            ) from error


def end_plainly(work: Callable[[], object]) -> None:
    """Run `work` with logs to standard error; an error that a user can mend is one message and a status.

    The status is 1, or 75 where a signal asked the process to stop and 130 after Ctrl-C.
    """
    # Of several processes of a run, one tells how it goes; the others tell what goes wrong.
    quiet = is_rank() and os.environ["RANK"] != "0"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler])
    for noisy in ("httpx", "matplotlib", "fontTools", "timm"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # That kernels which nothing here calls are absent, wherever it is imported, and peft imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Python's own way to standard error shows a warning's text as it is.
    logging.captureWarnings(True)
    try:
        work()
    except VipoError as error:
        _tell(str(error))
        _leave(error.STATUS if isinstance(error, Preempted | Interrupted) else 1)
    except OSError as error:
        _tell(f"{error}; check that the path exists, permissions and free space")
        _leave(1)
    finally:
        logging.captureWarnings(False)


def end_process() -> None:
    """End with status 0 as Python does, but without taking apart all that was imported.

    Threads are waited for, exit functions run and streams are written out, in Python's order: `multiprocessing` ends
    its processes so. What is left out takes a second where torch and diffusers were imported, and prints a page about
    what Triton's bindings still hold. Returns where a stream cannot be written, for Python to tell.
    """
    # Of the standard library, without a public name.
    vars(threading)["_shutdown"]()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(0)


def _ask_for_another_try(number: int) -> None:
    name = signal.Signals(number).name
    os.write(2, f"error: stopped by {name}; start the same command again, and it goes on where it can\n".encode())
    # No exception: a library that is being imported might take it for its own.
    os._exit(Preempted.STATUS)


def _leave(status: int) -> None:
    if is_rank():
        # One of several processes would wait in its clean-up for partners that may hang.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _tell(text: str) -> None:
    # Whoever read the messages may have been killed with the job; the exit status still counts.
    with contextlib.suppress(BrokenPipeError):
        typer.echo(f"error: {message(text)}", err=True)
