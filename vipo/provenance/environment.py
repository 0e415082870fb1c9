"""What a result depends on beside its inputs: code, commit, libraries, hardware."""

import contextlib
import hashlib
import importlib.metadata
import io
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import vipo
from vipo.provenance.files import file_sha256

_LIBRARIES = (
    *("torch", "diffusers", "transformers", "accelerate", "timm", "peft", "numpy", "scipy"),
    # Tables, figures and pages are theirs.
    *("pandas", "pyarrow", "matplotlib", "pillow"),
)
_UNKNOWN = {"commit": None, "dirty": None, "untracked": None, "diff_sha256": None}
# Written by the workflow itself, so their change is no change of the code.
_NOT_CODE = (":(exclude)results", ":(exclude)dvc.lock")
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
    """What `package_sha256` is of the package in ``vipo/`` of a repository's commit; None where it holds none."""
    archive = git_output(root, "archive", "--format=tar", commit, "--", "vipo")
    if archive is None:
        return None
    hashes = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            name, content = member.name.removeprefix("vipo/"), files.extractfile(member)
            if content is not None and _IDENTIFIES.fullmatch(name):
                hashes[name] = hashlib.sha256(content.read()).hexdigest()
    return _package_sha256(hashes)


def _package_sha256(hashes: Mapping[str, str]) -> str:
    lines = sorted(f"{sha256}  {name}\n" for name, sha256 in hashes.items())
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
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "--git-dir"], capture_output=True, text=True)
    except FileNotFoundError:
        return "git is not installed"
    return " ".join(done.stderr.split())


def code_folder() -> Path | None:
    """Top of the repository that holds the running package, whatever the working directory; None where none does."""
    # A repository that merely surrounds the package (an environment's folder, which it ignores) says nothing of it.
    held = git_output(_package(), "ls-files", "--error-unmatch", "--", "__init__.py")
    return None if held is None else _top(_package())


def code_state() -> tuple[dict[str, Any], bytes]:
    """State (as `git_state` gives it) and diff (of `git_diff`) of the repository that holds the running package.

    Where the package lies in none, in a container image, the commit is the one that the image was built from
    (``VIPO_GIT_COMMIT``): it holds the files of that commit and no others. All None where neither tells.
    """
    folder = code_folder()
    if folder is not None:
        diff = git_diff(folder)
        return git_state(folder, diff), diff
    # Looked for without git, which refuses another user's repository: such a checkout is mounted, not the image's.
    surrounded = any((parent / ".git").exists() for parent in _package().parents)
    built_from = os.environ.get("VIPO_GIT_COMMIT")
    if surrounded or not built_from:
        return dict(_UNKNOWN), b""
    return {"commit": built_from, "dirty": False, "untracked": {}, "diff_sha256": None}, b""


def checkout_state(root: Path) -> tuple[dict[str, Any], bytes] | None:
    """State and diff of the repository of configurations and data; None where the code is from the same one."""
    top = _top(root)
    same = top == code_folder() if top is not None else _package().is_relative_to(root.resolve())
    if same:
        return None
    diff = git_diff(root)
    return git_state(root, diff), diff


def code_identity() -> dict[str, Any]:
    """The running code in short: ``package_sha256``, and ``commit`` and ``dirty`` of `code_state`."""
    state, _ = code_state()
    return {"package_sha256": package_sha256(), "commit": state["commit"], "dirty": state["dirty"]}


def git_state(root: Path, diff: bytes | None = None) -> dict[str, Any]:
    """The commit that `root` is at, and whether there is anything beside it.

    Files below ``results/`` and ``dvc.lock`` do not count, for the workflow writes them, nor do files that git ignores.

    Args:
        root: repository root, or a folder that git knows nothing of.
        diff: of `git_diff`, where the caller keeps it; made here otherwise.

    Returns:
        ``commit`` (hex), ``dirty`` (bool: a tracked file differs), ``untracked`` (bytes of the files that git does not
        track, by path) and ``diff_sha256`` (hex SHA-256 of `git_diff`, None where it is empty); all None without git
        or outside a repository.
    """
    commit, tracked, untracked = (
        git_output(root, "rev-parse", "--verify", "HEAD"),
        _diff(root, "HEAD"),
        _untracked(root),
    )
    if commit is None or tracked is None or untracked is None:
        return dict(_UNKNOWN)
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
        # The first one on the path is the one that is imported.
        found.setdefault(re.sub(r"[-_.]+", "-", distribution.name).lower(), distribution.version)
    found.pop("vipo", None)
    return hashlib.sha256("".join(sorted(f"{name}=={found[name]}\n" for name in found)).encode()).hexdigest()


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


def _top(folder: Path) -> Path | None:
    printed = git_output(folder, "rev-parse", "--show-toplevel")
    return None if printed is None else Path(os.fsdecode(printed.removesuffix(b"\n")))


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
