"""Deterministic kernels hold on a GPU too, where a matrix product is refused without a fixed workspace."""

import os

import pytest
import torch

from vipo.determinism import deterministic_algorithms


def test_the_workspace_that_cublas_needs_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        deterministic_algorithms()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.are_deterministic_algorithms_enabled()
        # Of the values that PyTorch accepts, the larger.
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before)
