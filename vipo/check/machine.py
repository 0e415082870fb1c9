"""Lines on this machine: GPUs, their driver, what processes talk through. Reads no more than nvidia-smi and files."""

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vipo.check.line import Line, not_known, ok, to_do
from vipo.config.run import Config

# NVIDIA's own table (CUDA release notes, minor version compatibility): the first driver of each major version of CUDA.
_LEAST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
_LEAST_SHARED = 2**30
_QUERY = ("nvidia-smi", "--query-gpu=driver_version,memory.total,name", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """A GPU that nvidia-smi lists; `memory` in bytes."""

    name: str
    memory: int
    driver: tuple[int, ...]


def gpus() -> list[Gpu]:
    """Those of this machine that CUDA_VISIBLE_DEVICES leaves; none where there is no nvidia-smi."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ", 2) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    every = [
        Gpu(row[2], int(row[1]) * 2**20, tuple(map(int, row[0].split("."))))
        for row in rows
        if len(row) == 3 and row[1].isdecimal() and re.fullmatch(r"\d+(\.\d+)*", row[0])
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return every
    chosen = [item.strip() for item in visible.split(",") if item.strip()]
    # Names of devices instead of numbers are counted, not looked up.
    if all(item.isdecimal() for item in chosen):
        return [every[int(item)] for item in chosen if int(item) < len(every)]
    return every[: len(chosen)]


def machine_lines(config: Config, present: list[Gpu]) -> Iterator[Line]:
    """GPUs wanted against present, the driver against the environment's CUDA, and what several processes need.

    Args:
        config: a run that is to be trained.
        present: as `gpus` gives them.
    """
    if not config.generator.device.startswith("cuda"):
        yield ok("GPUs", f"none wanted: generator.device {config.generator.device}")
        return
    wanted, several = config.distribution.processes, config.distribution.world_size > 1
    if len(present) < wanted:
        yield to_do(
            "GPUs",
            f"{wanted} wanted on each node (distribution.processes), {len(present)} here; check where training runs "
            "(a login node has none), lower distribution.processes, or choose another hardware setup",
        )
    else:
        yield ok("GPUs", f"{wanted} wanted on each node, {len(present)} here: {present[0].name}")
    yield _driver(present)
    if config.generator.compile != "none":
        yield _compiler(config)
    if several:
        yield _nccl()
        yield from _interface(config)
        yield _shared_memory()


def _driver(present: list[Gpu]) -> Line:
    cuda = _built_with()
    if cuda is None:
        return to_do("driver", "the installed torch has no CUDA; make the environment again with its CUDA build")
    least = _LEAST_DRIVER.get(int(cuda.partition(".")[0]))
    if not present:
        return not_known("driver", f"torch is built with CUDA {cuda}; no driver is here")
    if least is None:
        return not_known("driver", f"torch is built with CUDA {cuda}, whose least driver is not known to vipo")
    driver = min(gpu.driver for gpu in present)
    written, needed = (".".join(f"{part:02d}" for part in value) for value in (driver, least))
    if driver < least:
        return to_do(
            "driver", f"{written} is older than {needed}, which CUDA {cuda} of the lock needs; update the driver"
        )
    return ok("driver", f"{written}, CUDA {cuda} of the lock needs {needed}")


def _compiler(config: Config) -> Line:
    from vipo.generators.base import GeneratorError
    from vipo.generators.compiler import check_compiler

    try:
        check_compiler(config.generator)
    except GeneratorError as error:
        return to_do("compiler", str(error))
    return ok("compiler", "a C compiler and Python.h, for generator.compile")


def _built_with() -> str | None:
    """The CUDA version that torch was built with, without importing it."""
    try:
        place = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        found = re.search(r"^cuda\b.*= '([\d.]+)'", Path(str(place)).read_text(encoding="utf-8"), re.MULTILINE)
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    return None if found is None else found[1]


def _nccl() -> Line:
    names = (item.name or "" for item in importlib.metadata.distributions())
    installed = sorted({name for name in names if name.startswith("nvidia-nccl-")})
    if not installed:
        return to_do("NCCL", "no package nvidia-nccl-cu*, by which GPUs talk; make the environment again (make env)")
    return ok("NCCL", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed))


def _interface(config: Config) -> Iterator[Line]:
    named = os.environ.get("NCCL_SOCKET_IFNAME", "").lstrip("^=")
    have = sorted(path.name for path in Path("/sys/class/net").glob("*"))
    if config.distribution.nodes > 1 and named:
        if any(name.startswith(part) for part in named.split(",") for name in have):
            yield ok("network", f"NCCL_SOCKET_IFNAME {named}")
        else:
            yield to_do("network", f"NCCL_SOCKET_IFNAME {named}: no such interface here; one of {', '.join(have)}")


def _shared_memory() -> Line:
    size = shutil.disk_usage("/dev/shm").total
    if size < _LEAST_SHARED:
        return to_do(
            "shared memory",
            f"/dev/shm has {size / 2**20:.0f} MiB, through which NCCL's processes of a node talk; start the container "
            "with --shm-size=8g or --ipc=host",
        )
    return ok("shared memory", f"/dev/shm {size / 2**30:.1f} GiB")
