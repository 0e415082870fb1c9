"""What a result depends on beside its inputs: code, commit, libraries, hardware."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import vipo
from vipo.provenance.commits import commit_files
from vipo.provenance.files import file_sha256
from vipo.provenance.git import GitError, find_repository, is_tracked
from vipo.provenance.working_tree import working_tree

log = logging.getLogger(__name__)

_LIBRARIES = (
    *("torch", "diffusers", "transformers", "accelerate", "timm", "peft", "numpy", "scipy"),
    # Tables, figures and pages are theirs.
    *("pandas", "pyarrow", "matplotlib", "pillow"),
)
_UNKNOWN = {"commit": None, "dirty": None, "untracked": None, "diff_sha256": None}
# Larger untracked files are data, which a stage that reads them records as its input.
_STORED_BYTES = 2**20
# Files that make up a package's identity, by their path in it.
_IDENTIFIES = re.compile(r".+\.py|(.+/)?templates/.+")


def package_sha256() -> str:
    """Identity of the installed vipo package: SHA-256 over all its Python and template files and their names."""
    package = _package()
    names = (path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file())
    return _package_sha256({name: file_sha256(package / name) for name in names if _IDENTIFIES.fullmatch(name)})


def package_sha256_at(root: Path, commit: str) -> str | None:
    """What `package_sha256` is of the package in ``vipo/`` of a repository's commit; None where it holds none.

    Raises:
        MissingObject, ForgedObject: see `commit_file`.
    """
    held = commit_files(root, commit, "vipo")
    if held is None:
        return None
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in held.items()}
    return _package_sha256({name: sha256 for name, sha256 in hashes.items() if _IDENTIFIES.fullmatch(name)})


def _package_sha256(hashes: Mapping[str, str]) -> str:
    lines = sorted(f"{sha256}  {name}\n" for name, sha256 in hashes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def code_folder() -> Path | None:
    """Top of the repository that holds the running package, whatever the working directory; None where none does."""
    # A repository that merely surrounds the package (an environment's folder, which it ignores) says nothing of it.
    repository = find_repository(_package()) if is_tracked(_package(), "__init__.py") else None
    return None if repository is None else repository.top


def code_state() -> tuple[dict[str, Any], bytes]:
    """State (as `git_state` gives it) and diff of the repository that holds the running package.

    Where the package lies in none, in a container image, the commit is the one that the image was built from
    (``VIPO_GIT_COMMIT``): it holds the files of that commit and no others. All None where neither tells.
    """
    folder = code_folder()
    if folder is not None:
        return _state(folder)
    # Looked for without git, which refuses another user's repository: such a checkout is mounted, not the image's.
    surrounded = any((parent / ".git").exists() for parent in _package().parents)
    built_from = os.environ.get("VIPO_GIT_COMMIT")
    if surrounded or not built_from:
        return dict(_UNKNOWN), b""
    return {"commit": built_from, "dirty": False, "untracked": {}, "diff_sha256": None}, b""


def checkout_state(root: Path) -> tuple[dict[str, Any], bytes] | None:
    """State and diff of the repository of configurations and data; None where the code is from the same one."""
    repository = find_repository(root)
    same = _package().is_relative_to(root.resolve()) if repository is None else repository.top == code_folder()
    return None if same else _state(root)


def code_identity() -> dict[str, Any]:
    """The running code in short: ``package_sha256``, and ``commit`` and ``dirty`` of `code_state`."""
    state, _ = code_state()
    return {"package_sha256": package_sha256(), "commit": state["commit"], "dirty": state["dirty"]}


def git_state(root: Path) -> dict[str, Any]:
    """The commit that `root` is at, and whether there is anything beside it (see `WorkingTree`).

    Args:
        root: repository root, or a folder that git knows nothing of.

    Returns:
        ``commit`` (hex), ``dirty`` (bool: a tracked file differs), ``untracked`` (bytes of the files that git does not
        track, by path) and ``diff_sha256`` (hex SHA-256 of what ``git apply`` puts onto the commit to give the code
        that runs: the changes of tracked files, and untracked files of at most 1 MiB; None where that is empty); all
        None without git or outside a repository.
    """
    return _state(root)[0]


def _state(root: Path) -> tuple[dict[str, Any], bytes]:
    """What `git_state` says, and the diff."""
    try:
        return _read_state(root)
    except GitError as error:
        # A stage need not stop for it; its record says that nothing is known.
        log.warning("%s; this run's record names no commit", error)
        return dict(_UNKNOWN), b""


def _read_state(root: Path) -> tuple[dict[str, Any], bytes]:
    with working_tree(root) as tree:
        if tree is None:
            return dict(_UNKNOWN), b""
        # A larger one, data most likely, is named alone.
        diff = tree.tracked + tree.added([name for name, size in tree.untracked.items() if size <= _STORED_BYTES])
        return {
            "commit": tree.commit,
            "dirty": bool(tree.tracked),
            "untracked": tree.untracked,
            "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
        }, diff


def hardware() -> dict[str, Any]:
    """CPU model, logical cores, memory in bytes, names of the GPUs, versions of their driver and of CUDA.

    Where torch is loaded, GPUs are those that it can use, and ``cuda`` is the version that it was built with;
    elsewhere they are those that nvidia-smi lists. What neither tells is None; an empty list says that there are none.
    """
    names, driver = _nvidia_smi()
    torch = sys.modules.get("torch")
    if torch is not None:
        # A driver that torch cannot use is no reason to stop.
        with contextlib.suppress(RuntimeError):
            names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": names,
        "gpu_driver": driver,
        "cuda": None if torch is None else torch.version.cuda,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, vipo and the libraries that decide results; None for one that is not installed."""
    return {
        "python": platform.python_version(),
        "vipo": vipo.__version__,
        **{library: _installed(library) for library in _LIBRARIES},
    }


def lock_sha256() -> str | None:
    """SHA-256 of the ``requirements.lock`` beside the running package, which its environment is made from."""
    lock = _package().parent / "requirements.lock"
    return file_sha256(lock) if lock.is_file() else None


def installed_sha256() -> str:
    """Identity of the environment: SHA-256 over the lines ``<name>==<version>`` of all installed distributions, sorted.

    Names are normalised as in ``requirements.lock``; vipo is left out, for `package_sha256` names it.
    """
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # Parsed once for both. The first one on the path is the one that is imported.
        metadata = distribution.metadata
        found.setdefault(re.sub(r"[-_.]+", "-", metadata["Name"]).lower(), metadata["Version"])
    found.pop("vipo", None)
    return hashlib.sha256("".join(sorted(f"{name}=={found[name]}\n" for name in found)).encode()).hexdigest()


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines() if information.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _nvidia_smi() -> tuple[list[str] | None, str | None]:
    """Names of the GPUs and version of their driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None, None
    if done.returncode != 0:
        return None, None
    rows = [line.partition(", ") for line in done.stdout.splitlines()]
    return [name for _, _, name in rows], rows[0][0] if rows else None


def _installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
