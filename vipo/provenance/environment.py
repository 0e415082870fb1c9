"""What a result depends on beside its inputs: code, commit, libraries, hardware."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

import vipo
from vipo.provenance.files import file_sha256

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "timm", "peft", "numpy")
# Written by the workflow itself, so their change is no change of the code.
_NOT_CODE = (":(exclude)results", ":(exclude)dvc.lock")


def package_sha256() -> str:
    """Identity of the installed vipo package: SHA-256 over all its Python and template files and their names."""
    package = Path(__file__).resolve().parents[1]
    files = [*package.rglob("*.py"), *(path for path in package.glob("**/templates/**/*") if path.is_file())]
    lines = sorted(f"{file_sha256(path)}  {path.relative_to(package).as_posix()}\n" for path in set(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def git_state(root: Path) -> dict[str, Any]:
    """The commit that `root` is at and whether its tracked files differ from it.

    Files below ``results/`` and ``dvc.lock`` do not count, nor do files that git does not track. Where git knows
    nothing, in a container image, the commit is the one the image was built from (``VIPO_GIT_COMMIT``): it holds
    the files of that commit and no others.

    Returns:
        ``commit`` (hex), ``dirty`` (bool) and ``diff_sha256`` (hex of the binary diff, None where clean);
        all None without git or outside a repository, unless ``VIPO_GIT_COMMIT`` is set.
    """
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    # Every option that a user's git configuration could change is set, so that one diff has one hash.
    diff = _git(
        root,
        "-c", "core.quotePath=true",
        "diff", "HEAD", "--binary", "--full-index", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames",
        "--diff-algorithm=myers", "--unified=3", "--src-prefix=a/", "--dst-prefix=b/", "--", ".", *_NOT_CODE,
    )  # fmt: skip
    if commit is None or diff is None:
        built_from = os.environ.get("VIPO_GIT_COMMIT") or None
        return {"commit": built_from, "dirty": None if built_from is None else False, "diff_sha256": None}
    return {
        "commit": commit.decode().strip(),
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def hardware() -> dict[str, Any]:
    """CPU model, logical cores, memory in bytes and the names of the GPUs of this machine."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpu_names(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, vipo and the libraries that decide numbers; None for one that is not installed."""
    return {
        "python": platform.python_version(),
        "vipo": vipo.__version__,
        **{library: _installed(library) for library in _LIBRARIES},
    }


def _git(root: Path, *arguments: str) -> bytes | None:
    # Inside a git hook these point at another repository than the one asked about.
    foreign = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, env=environment, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


def _installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
