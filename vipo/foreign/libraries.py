"""What libraries and the system keep for the whole process, beside what `vipo.foreign.settings` names itself."""

import os
import resource
import socket
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image, ImageFile
from torch.nn.modules import module as modules

from vipo.foreign.setting import Setting, attribute

_LIMITS = tuple(getattr(resource, f"RLIMIT_{name}") for name in ("AS", "CPU", "DATA", "FSIZE", "NOFILE", "STACK"))
_HOOKS: tuple[dict[Any, Any], ...] = tuple(
    value for name, value in sorted(vars(modules).items()) if name.startswith("_global_") and isinstance(value, dict)
)


def _write_limits(wanted: tuple[tuple[int, int], ...]) -> None:
    for limit, value in zip(_LIMITS, wanted, strict=True):
        if resource.getrlimit(limit) != value:
            resource.setrlimit(limit, value)


def _read_hooks() -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(hooks.items()) for hooks in _HOOKS)


def _write_hooks(wanted: tuple[tuple[Any, ...], ...]) -> None:
    # In place: every call of a module reads these very mappings.
    for hooks, items in zip(_HOOKS, wanted, strict=True):
        hooks.clear()
        hooks.update(items)


LIBRARIES: Mapping[str, Setting] = MappingProxyType(
    {
        "Pillow's limit of pixels": attribute(Image, "MAX_IMAGE_PIXELS"),
        # With it, half a picture is read as a whole one.
        "Pillow's reading of cut-off pictures": attribute(ImageFile, "LOAD_TRUNCATED_IMAGES"),
        "torch's hooks of all modules": Setting(_read_hooks, _write_hooks),
        "the showing of warnings": Setting(
            lambda: warnings.showwarning, lambda value: setattr(warnings, "showwarning", value), own=False
        ),
        "the time-out of connections": Setting(socket.getdefaulttimeout, socket.setdefaulttimeout),
        "the limits of resources": Setting(lambda: tuple(map(resource.getrlimit, _LIMITS)), _write_limits),
        "the processors": Setting(
            lambda: frozenset(os.sched_getaffinity(0)), lambda value: os.sched_setaffinity(0, value)
        ),
        "math attention's reductions": Setting(
            torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
        ),
        "cuda.matmul.allow_fp16_accumulation": attribute(torch.backends.cuda.matmul, "allow_fp16_accumulation"),
    }
)
"""By name."""
