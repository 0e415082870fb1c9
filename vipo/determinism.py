"""Deterministic kernels, on every device."""

import os

import torch


def deterministic_algorithms() -> None:
    """From now on PyTorch takes deterministic kernels only, and raises where there is none.

    cuBLAS is deterministic with a fixed workspace alone, which it reads from the environment when it is first used:
    without it, the first matrix product on a GPU is an error.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
