"""What a command asks of Python and of libraries before it does anything: figures in docs/performance.md."""

import ctypes
import gc
import os
import sys

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MIB = 2**20
# (variable, value) without which cuBLAS is not deterministic; of those that PyTorch accepts, the larger.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def settle_runtime() -> None:
    """Let a short-lived process import and compute without collecting and returning memory that it needs again.

    That changes when memory is given back, and no result. Where the C library is another than glibc, the first part
    alone. Fixes cuBLAS's workspace, too: see `vipo.determinism`.
    """
    # PyTorch looks at it once, at a process's first matrix product: a text encoder's, before anything is deterministic.
    name, value = CUBLAS_WORKSPACE
    os.environ[name] = value
    # Half a million objects are imported and stay: full collections would go over all of them, again and again.
    gc.set_threshold(10_000, 10, 100)
    # A backward pass frees what the next one asks for. Left to itself, glibc gives it back and each page is fetched and
    # cleared anew. Above the second bound tensors are mapped, and returned, one by one.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 512 * _MIB)
        mallopt(_MMAP_THRESHOLD, 32 * _MIB)
