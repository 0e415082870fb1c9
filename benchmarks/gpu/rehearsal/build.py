"""Builds the rehearsal's libraries for this environment's PyTorch, once, and prints the folder that holds them."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

_NATIVE = Path(__file__).resolve().parent / "native"
ROOT = _NATIVE.parents[3]
_COMPILER = "g++"
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra")
_AT_ONCE = 2
# By library, the longest first. librehearsal.so is loaded before all others, so that its CUDA and NCCL are found and
# not the real ones.
_SOURCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "operators.so": ("together",),
        "librehearsal.so": ("runtime", "memory", "collectives", "group", "refused"),
        "libcuda.so.1": ("driver",),
    }
)
_TORCH = ("torch_cpu", "torch_cuda", "c10", "c10_cuda")


def build(folder: Path) -> Path:
    """The folder below `folder` with the libraries of these sources, this PyTorch and this compiler; made if need be.

    Raises:
        RuntimeError: there is no compiler, or PyTorch is without CUDA, or a source does not compile; says which.
    """
    # Importing torch takes seconds, and every rehearsed command would pay them.
    torch = Path(str(importlib.metadata.distribution("torch").locate_file("torch")))
    built = folder / _identity()
    if built.is_dir():
        return built
    if not (torch / "lib" / "libtorch_cuda.so").is_file():
        raise RuntimeError(f"the PyTorch in {torch} is built without CUDA, which is what is rehearsed")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        made = Path(name) / "made"
        made.mkdir()
        compiled = functools.partial(_compile, made, torch, _includes(torch))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(compiled, _SOURCES))
        try:
            made.rename(built)
        except OSError:
            # Another process was sooner, with the same.
            if not built.is_dir():
                raise
    return built


def _identity() -> str:
    """Of what the libraries are made from."""
    read = hashlib.sha256()
    for path in sorted(path for path in _NATIVE.rglob("*") if path.is_file()):
        read.update(path.read_bytes())
    made_for = _run("--version"), platform.machine(), importlib.metadata.version("torch")
    read.update(repr((_FLAGS, dict(_SOURCES), made_for)).encode())
    return read.hexdigest()[:16]


def _includes(torch: Path) -> list[str]:
    """Options for the headers of PyTorch, CUDA and NCCL, as their wheels bring them."""
    found = [_NATIVE / "include", torch / "include", torch / "include/torch/csrc/api/include"]
    for header in ("cuda_runtime_api.h", "nccl.h", "nv/target"):
        there = sorted(torch.parent.glob(f"nvidia/*/include/**/{header}"))
        if not there:
            raise RuntimeError(f"no {header} below {torch.parent / 'nvidia'}: PyTorch's wheels for CUDA bring it")
        found.append(there[-1].parents[header.count("/")])
    # Others' warnings are not ours.
    return [f"-isystem{path}" for path in found]


def _compile(folder: Path, torch: Path, includes: list[str], library: str) -> None:
    sources = [str(_NATIVE / f"{source}.cpp") for source in _SOURCES[library]]
    needs = [f"-L{torch / 'lib'}", *(f"-l{each}" for each in _TORCH)] if library == "operators.so" else []
    _run(*_FLAGS, *includes, "-shared", *sources, "-o", str(folder / library), *needs)


def _run(*arguments: str) -> str:
    # Within a rehearsal the compiler itself is not rehearsed.
    env = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    try:
        done = subprocess.run([_COMPILER, *arguments], capture_output=True, text=True, check=False, env=env)
    except FileNotFoundError as error:
        raise RuntimeError(f"{_COMPILER} is not installed, which compiles the rehearsal (Debian: g++)") from error
    if done.returncode != 0:
        raise RuntimeError(f"{_COMPILER} {' '.join(arguments[-3:])} failed:\n{done.stderr[:4000]}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(build(ROOT / ".rehearsal"))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
