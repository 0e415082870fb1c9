"""Memory that is given back, and that runs out: told as what it is, with the settings that lower what work takes."""

import contextlib
import gc
from collections.abc import Iterator

import torch

from vipo.errors import VipoError

# Of the CPU's allocator and of cuBLAS, whose errors have no type of their own.
_TOLD = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")


class OutOfMemory(VipoError):
    """Memory ran out; the message names the work and the settings that lower what it takes."""


def free(device: str) -> None:
    """Give back the memory of what was just let go of, to other processes on `device` too."""
    gc.collect()
    # What is alive between two networks is what was imported, and stays: the next collection does not look at it again.
    gc.freeze()
    if device != "cpu":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def memory_errors(work: str, remedy: str) -> Iterator[None]:
    """Around `work` that may take more memory than there is, also where a library or a plugin wraps the error.

    Args:
        work: what is done, for the message.
        remedy: the settings that lower what it takes.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not _ran_out(cause):
            cause = cause.__cause__
        if cause is None:
            raise
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise OutOfMemory(f"{work}: out of memory ({reason}). {remedy}") from error


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _TOLD)
