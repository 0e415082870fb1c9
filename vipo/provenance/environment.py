"""What a result depends on beside its inputs: code, commit, libraries, hardware."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psutil

import vipo
from vipo.provenance.files import file_sha256

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "timm", "peft", "numpy")
# Written by the workflow itself, so their change is no change of the code.
_NOT_CODE = (":(exclude)results", ":(exclude)dvc.lock")
# Larger untracked files are data, which a stage that reads them records as its input.
_STORED_BYTES = 2**20


def package_sha256() -> str:
    """Identity of the installed vipo package: SHA-256 over all its Python and template files and their names."""
    package = Path(__file__).resolve().parents[1]
    files = [*package.rglob("*.py"), *(path for path in package.glob("**/templates/**/*") if path.is_file())]
    lines = sorted(f"{file_sha256(path)}  {path.relative_to(package).as_posix()}\n" for path in set(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def git_output(root: Path, *arguments: str, **variables: str) -> bytes | None:
    """What a git command prints in `root`, whatever hook or variables this process runs under; None where it fails."""
    # Inside a git hook these point at another repository than the one asked about.
    foreign = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", **variables}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, env=environment, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def git_problem(root: Path) -> str | None:
    """What git says where it does not read the repository that `root` is; None where it does, or there is none."""
    if not (root / ".git").exists() or git_output(root, "rev-parse", "--git-dir") is not None:
        return None
    if shutil.which("git") is None:
        return "git is not installed"
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--git-dir"], capture_output=True, text=True)
    return " ".join(done.stderr.split())


def git_state(root: Path, diff: bytes | None = None) -> dict[str, Any]:
    """The commit that `root` is at, and whether there is anything beside it.

    Files below ``results/`` and ``dvc.lock`` do not count, for the workflow writes them, nor do files that git ignores.
    Where git knows nothing, in a container image, the commit is the one the image was built from (``VIPO_GIT_COMMIT``):
    it holds the files of that commit and no others.

    Args:
        root: repository root, or a folder that git knows nothing of.
        diff: of `git_diff`, where the caller keeps it; made here otherwise.

    Returns:
        ``commit`` (hex), ``dirty`` (bool: a tracked file differs), ``untracked`` (bytes of the files that git does not
        track, by path) and ``diff_sha256`` (hex SHA-256 of `git_diff`, None where it is empty); all None without git
        or outside a repository, unless ``VIPO_GIT_COMMIT`` is set.
    """
    commit, tracked, untracked = (
        git_output(root, "rev-parse", "--verify", "HEAD"),
        _diff(root, "HEAD"),
        _untracked(root),
    )
    if commit is None or tracked is None or untracked is None:
        if built_from := os.environ.get("VIPO_GIT_COMMIT"):
            return {"commit": built_from, "dirty": False, "untracked": {}, "diff_sha256": None}
        return {"commit": None, "dirty": None, "untracked": None, "diff_sha256": None}
    diff = git_diff(root) if diff is None else diff
    return {
        "commit": commit.decode().strip(),
        "dirty": bool(tracked),
        "untracked": untracked,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def git_diff(root: Path) -> bytes:
    """What ``git apply`` puts onto the commit of `git_state` to give the code that runs.

    It holds the changes of tracked files, and the untracked files of at most 1 MiB; a larger one (data, most likely)
    is named in ``untracked`` alone. Empty where there is nothing, or no repository.
    """
    small = [name for name, size in (_untracked(root) or {}).items() if size <= _STORED_BYTES]
    added = b""
    if small:
        # Index and objects of its own, so that the user's repository is only read.
        with tempfile.TemporaryDirectory() as folder:
            own = {"GIT_INDEX_FILE": f"{folder}/index", "GIT_OBJECT_DIRECTORY": folder}
            git_output(root, "--literal-pathspecs", "add", "--intent-to-add", "--", *small, **own)
            added = _diff(root, **own) or b""
    return (_diff(root, "HEAD") or b"") + added


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


def _diff(root: Path, *arguments: str, **variables: str) -> bytes | None:
    # Every option that a user's git configuration could change is set, so that one diff has one hash.
    return git_output(
        root,
        "-c", "core.quotePath=true", "-c", "diff.autoRefreshIndex=false",
        "diff", *arguments, "--binary", "--full-index", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames",
        "--diff-algorithm=myers", "--unified=3", "--src-prefix=a/", "--dst-prefix=b/", "--", ".", *_NOT_CODE,
        **variables,
    )  # fmt: skip


def _untracked(root: Path) -> dict[str, int] | None:
    listed = git_output(root, "ls-files", "--others", "--exclude-standard", "-z", "--", ".", *_NOT_CODE)
    if listed is None:
        return None
    # A name that ends in a slash is another repository's folder; an editor's temporary file may be gone by now.
    names = sorted(name for name in os.fsdecode(listed).split("\0") if name and not name.endswith("/"))
    return {name: (root / name).lstat().st_size for name in names if os.path.lexists(root / name)}


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
