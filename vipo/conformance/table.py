"""`vipo check-generator`: all comparisons of one checkpoint, and the table of them."""

import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import torch

from vipo.conformance import checks, training
from vipo.conformance.checks import Finding
from vipo.conformance.subject import Subject
from vipo.generators.base import GeneratorError

CHECKS: Mapping[str, Callable[[Subject], list[Finding]]] = MappingProxyType(
    {
        "prediction": checks.prediction,
        "sample": checks.sample,
        "joined": checks.joined,
        "update_lora": partial(training.update, mode="lora"),
        "update_full": partial(training.update, mode="full"),
        "export_lora": partial(training.export, mode="lora"),
        "export_full": partial(training.export, mode="full"),
        "gradients": checks.gradients,
        "bf16": checks.bf16,
        "frozen_bf16": training.frozen_bf16,
    }
)
"""The comparisons by name, each with what it finds."""


def run_checks(compared: Subject, without: Collection[str] = ()) -> Iterator[Finding]:
    """Each comparison's findings as they come; one that raises an error of ours is one that fails.

    Args:
        compared: the checkpoint.
        without: names of comparisons that are left out.

    Raises:
        GeneratorError: `without` names none.
    """
    if unknown := sorted(set(without) - CHECKS.keys()):
        raise GeneratorError(f"--without {unknown[0]}: is none of the checks {', '.join(CHECKS)}")
    for name, check in CHECKS.items():
        if name in without:
            yield Finding(name, "does not apply", note="left out by --without")
            continue
        try:
            yield from check(compared)
        except GeneratorError as error:
            yield Finding(name, "fails", note=str(error))
        # A network a check: what the last one held is not waited for.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def line(found: Finding) -> str:
    """A finding as the table shows it."""
    measured = "" if found.found is None else f"{found.found:.1e} of {found.limit:.1e}"
    return f"{found.name:<52} {found.result:<14} {measured:<20} {found.note}".rstrip()
