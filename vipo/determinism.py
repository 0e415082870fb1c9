"""What a process computes by, on every device: deterministic kernels, and threads."""

import os

import torch

from vipo.runtime import CUBLAS_WORKSPACE


def deterministic_algorithms() -> None:
    """From now on PyTorch takes deterministic kernels only, and raises where there is none.

    cuBLAS is deterministic with a fixed workspace alone, which it reads from the environment when it is first used:
    without it, the first matrix product on a GPU is an error.
    """
    name, value = CUBLAS_WORKSPACE
    os.environ[name] = value
    torch.use_deterministic_algorithms(True)
    # For those who look for reads of memory that nothing wrote: each allocation would be a kernel that fills it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def prepare_process(device: str, threads: int, local_rank: int = 0) -> None:
    """Threads, determinism and the device, as they are before anything is computed.

    Args:
        device: ``generator.device``.
        threads: ``training.threads``.
        local_rank: of several processes on this node, which of its GPUs is this one's.
    """
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(threads)
    deterministic_algorithms()
