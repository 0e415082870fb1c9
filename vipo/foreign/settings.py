"""What belongs to the whole process, and any module can change: how each such setting is read and put back."""

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.utils._mode_utils import no_dispatch

from vipo.foreign.libraries import LIBRARIES
from vipo.foreign.setting import Setting, attribute

_SIGNALS = tuple(
    getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "ALRM", "CHLD", "PIPE")
)


def _write_environment(wanted: Mapping[str, str]) -> None:
    for key in os.environ.keys() - wanted.keys():
        del os.environ[key]
    for key, value in wanted.items():
        if os.environ.get(key) != value:
            os.environ[key] = value


def _working_directory() -> str | None:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return None


def _write_signals(wanted: tuple[Any, ...]) -> None:
    for number, handler in zip(_SIGNALS, wanted, strict=True):
        # None: not installed from Python, which cannot install it either.
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _write_streams(wanted: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = wanted


def _loggers() -> list[logging.Logger]:
    """The root and vipo's own: `logging.config` switches off every logger that it is not told of."""
    named = logging.getLogger().manager.loggerDict
    # Before they are sorted: libraries have a thousand of their own.
    own = [named[name] for name in sorted(name for name in named if name == "vipo" or name.startswith("vipo."))]
    return [logging.getLogger(), *(logger for logger in own if isinstance(logger, logging.Logger))]


def _read_logging() -> tuple[Any, ...]:
    told = (
        (found.name, found.level, tuple(found.handlers), tuple(found.filters), found.disabled, found.propagate)
        for found in _loggers()
    )
    return logging.getLogger().manager.disable, *told


def _write_logging(wanted: tuple[Any, ...]) -> None:
    below, *told = wanted
    logging.disable(below)
    for name, level, handlers, filters, disabled, propagate in told:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters
        logger.disabled, logger.propagate = disabled, propagate


def _umask() -> int:
    # os.umask alone cannot read it without setting it, for other threads too.
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("Umask:")[2].split()[0], 8)


def _write_alarm(rings: bool) -> None:
    # One that rang before rings on, or cannot be wound up again. With its handler gone, one that is new would end vipo.
    if not rings:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _write_warnings(wanted: tuple[Any, ...]) -> None:
    # In place: the interpreter's own C code holds this very list.
    warnings.filters[:] = list(wanted)  # type: ignore[index]


def _numpy_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    name, keys, *rest = state
    # Bytes are compared as a whole.
    return (name, keys.tobytes(), *rest)


def _write_numpy_state(wanted: tuple[Any, ...]) -> None:
    name, keys, *rest = wanted
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))


def _torch_state() -> bytes:
    # Within `vipo plan` tensors hold no data; those of the state do.
    with no_dispatch():
        return torch.get_rng_state().numpy().tobytes()


def _write_torch_state(wanted: bytes) -> None:
    with no_dispatch():
        torch.set_rng_state(torch.frombuffer(bytearray(wanted), dtype=torch.uint8))


def _cuda() -> tuple[int, bytes] | None:
    if not torch.cuda.is_initialized():
        return None
    with no_dispatch():
        return torch.cuda.current_device(), torch.cuda.get_rng_state().numpy().tobytes()


def _write_cuda(wanted: tuple[int, bytes] | None) -> None:
    if wanted is None:
        # The device that a process begins with.
        torch.cuda.set_device(0)
    else:
        torch.cuda.set_device(wanted[0])
        with no_dispatch():
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(wanted[1]), dtype=torch.uint8))


def _default_device() -> torch.device | None:
    # Where none was chosen, the choice of 'cpu' would cost every call of torch a detour.
    device = torch.get_default_device()
    return None if device.type == "cpu" else device


def _flushes_denormals() -> bool:
    tiny = sys.float_info.min
    return tiny / 2 == 0.0


def _autocast() -> tuple[Any, ...]:
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    kinds = ("cpu", "cuda")
    enabled = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return (depth, torch.is_autocast_cache_enabled(), *enabled)


def _write_autocast(wanted: tuple[Any, ...]) -> None:
    depth, cached, *kinds = wanted
    now = _autocast()[0]
    for _ in range(depth - now):
        torch.autocast_increment_nesting()
    for _ in range(now - depth):
        torch.autocast_decrement_nesting()
    # What was cast under other settings must not be used under these.
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(cached)
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), kinds, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _matrix_flag(read: Callable[[], Any]) -> Any:
    try:
        return read()
    # The older interface cannot be read any more once the newer one has been written.
    except RuntimeError:
        return None


def _precisions() -> tuple[Any, ...]:
    flags = tuple(_matrix_flag(read) for read in _PRECISION_FLAGS)
    return (*flags, *(torch._C._get_fp32_precision_getter(*pair) for pair in _PRECISIONS))


def _write_precisions(wanted: tuple[Any, ...]) -> None:
    matrix, convolution, *exact = wanted
    # The older interface writes some of the newer one's: first, so that they end as they were.
    if matrix is not None:
        torch.set_float32_matmul_precision(matrix)
    if convolution is not None:
        torch.backends.cudnn.allow_tf32 = convolution
    for pair, value in zip(_PRECISIONS, exact, strict=True):
        torch._C._set_fp32_precision_setter(*pair, value)


def _kernels() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


def _write_kernels(wanted: tuple[bool, ...]) -> None:
    cuda = torch.backends.cuda
    writers = (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_math_sdp, cuda.enable_cudnn_sdp)
    for write, value in zip(writers, wanted, strict=True):
        write(value)


def _main_thread(setting: Setting) -> Setting:
    """Python lets the main thread alone write it."""

    def write(value: Any) -> None:
        if threading.current_thread() is threading.main_thread() and setting.write is not None:
            setting.write(value)

    return Setting(setting.read, write, setting.own)


_BACKENDS = torch.backends
_PRECISION_FLAGS = (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32)
# From the general to the particular, which the general one overwrites; torch before 2.9 has none.
_PRECISIONS = tuple(
    pair
    for pair in (
        ("generic", "all"),
        *((backend, kind) for kind in ("all", "conv", "rnn", "matmul") for backend in ("mkldnn", "cuda")),
    )
    if hasattr(torch._C, "_get_fp32_precision_getter")
)

SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "the environment": Setting(lambda: dict(os.environ), _write_environment),
        "the working directory": Setting(_working_directory, os.chdir),
        "the mode of new files": Setting(_umask, os.umask),
        "sys.path": Setting(lambda: tuple(sys.path), lambda value: sys.path.__setitem__(slice(None), value)),
        "sys.argv": Setting(lambda: tuple(sys.argv), lambda value: sys.argv.__setitem__(slice(None), value), own=False),
        "the standard streams": Setting(
            lambda: (sys.stdout, sys.stderr),
            _write_streams,
            own=False,
        ),
        "sys.excepthook": Setting(lambda: sys.excepthook, lambda value: setattr(sys, "excepthook", value), own=False),
        "the recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
        "the garbage collector": Setting(gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
        "the locale": Setting(
            lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value)
        ),
        "the warnings' filters": Setting(lambda: tuple(warnings.filters), _write_warnings),
        "logging": Setting(_read_logging, _write_logging, own=False),
        "signal handlers": _main_thread(
            Setting(lambda: tuple(signal.getsignal(number) for number in _SIGNALS), _write_signals, own=False)
        ),
        "the alarm": Setting(lambda: signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0), _write_alarm, own=False),
        "Python's random numbers": Setting(random.getstate, random.setstate),
        "numpy's random numbers": Setting(_numpy_state, _write_numpy_state),
        "numpy's floating-point errors": Setting(np.geterr, lambda value: np.seterr(**value)),
        "torch's random numbers": Setting(_torch_state, _write_torch_state),
        "torch's CUDA device and random numbers": Setting(_cuda, _write_cuda),
        "torch's threads": Setting(torch.get_num_threads, torch.set_num_threads),
        "torch's deterministic algorithms": Setting(
            torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
        ),
        "torch's default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
        "torch's default device": Setting(_default_device, torch.set_default_device),
        "torch's denormals": Setting(_flushes_denormals, torch.set_flush_denormal),
        "torch's precision of float32": Setting(_precisions, _write_precisions),
        "torch's attention kernels": Setting(_kernels, _write_kernels),
        "cudnn.enabled": attribute(_BACKENDS.cudnn, "enabled"),
        "cudnn.benchmark": attribute(_BACKENDS.cudnn, "benchmark"),
        "cudnn.deterministic": attribute(_BACKENDS.cudnn, "deterministic"),
        "cuda.matmul.allow_fp16_reduced_precision_reduction": attribute(
            _BACKENDS.cuda.matmul, "allow_fp16_reduced_precision_reduction"
        ),
        "cuda.matmul.allow_bf16_reduced_precision_reduction": attribute(
            _BACKENDS.cuda.matmul, "allow_bf16_reduced_precision_reduction"
        ),
        "mkldnn.deterministic": attribute(_BACKENDS.mkldnn, "deterministic"),
        "mkldnn.enabled": attribute(_BACKENDS.mkldnn, "enabled"),
        "opt_einsum.enabled": attribute(_BACKENDS.opt_einsum, "enabled"),
        "opt_einsum.strategy": attribute(_BACKENDS.opt_einsum, "strategy"),
        **LIBRARIES,
        "autograd's anomaly detection": Setting(
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda value: torch.autograd.set_detect_anomaly(*value),
        ),
        "autocast": Setting(_autocast, _write_autocast, own=False),
        "gradients": Setting(torch.is_grad_enabled, torch.set_grad_enabled, own=False),
        "inference mode": Setting(torch.is_inference_mode_enabled, None, own=False),
        "a mode of torch's functions": Setting(torch._C._len_torch_function_stack, None, own=False),
        "a mode of torch's dispatch": Setting(torch._C._len_torch_dispatch_stack, None, own=False),
    }
)
"""By name. The threads between operations are not here: torch fixes their number once, and no result depends on it."""
