"""Every family in miniature on the device: is the adapter the stock pipeline there, and every ratio 1."""

import importlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.correct import without_tf32
from benchmarks.gpu.record import Record, others_go_on
from vipo.config.compose import repository_root
from vipo.conformance.checks import Finding
from vipo.conformance.subject import Subject, subject
from vipo.conformance.table import CHECKS
from vipo.determinism import deterministic_algorithms
from vipo.generators import load_generator

_CHECKS = ("prediction", "joined", "update_lora", "update_full", "bf16")


def _rows() -> Mapping[str, Any]:
    sys.path.insert(0, str(repository_root() / "tests"))
    return dict(importlib.import_module("families").FAMILIES)


def share_of_families(part: int, parts: int) -> list[str]:
    """The rows of ``tests/families.py`` of one of `parts` processes, from 1."""
    return list(_rows())[part - 1 :: parts]


def measure_families(record: Record, device: str, names: Sequence[str]) -> None:
    """Note, by family, what `vipo check-generator` finds on the device, and how far it predicts from the CPU.

    Args:
        names: rows of ``tests/families.py``.

    Raises:
        RuntimeError: a family failed, or a comparison of it; the others were measured.
    """
    rows, failed = _rows(), list[str]()
    for name in names:
        with others_go_on(record, name, failed), tempfile.TemporaryDirectory() as folder, without_tf32():
            row = rows[name]
            # What a stock pipeline has no deterministic kernel for is not vipo's.
            torch.use_deterministic_algorithms(False)
            compared = subject(
                row.config(row.write(Path(folder) / name), device=device), repository_root(), steps=row.steps
            )
            deterministic_algorithms()
            for found in _findings(compared):
                if found.found is not None:
                    record.put(f"{name}.{found.name}", found.found)
                if found.result == "fails":
                    record.put(f"{name}.{found.name}.fails", f"limit {found.limit}; {found.note}"[:500])
                    failed.append(f"{name} ({found.name})")
            record.put(f"{name}.prediction.difference_to_cpu", _difference_to_cpu(compared))
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _findings(compared: Subject) -> Iterator[Finding]:
    for check in _CHECKS:
        yield from CHECKS[check](compared)


@torch.no_grad()
def _difference_to_cpu(compared: Subject) -> float:
    """Largest, of the first prediction, relative to its root mean square."""
    config = compared.config.model_copy(update={"device": "cpu"})
    generator, expected = load_generator(config, compared.root), compared.sampled.prediction.cpu()
    given = {name: value.cpu() for name, value in compared.conditioning.items()}
    found = generator.predict(compared.noise.cpu(), compared.sampled.times(generator), given)
    return float((found - expected).abs().max() / expected.square().mean().sqrt())
