"""In what surroundings git is run; what is read through it is in `commits` and `working_tree`, and nowhere else.

A repository can be set up to lie: replaced objects, grafts, a shallow boundary, a forged commit-graph or object,
another working tree, index flags that hide a change, attributes and filters that rewrite it, programs that git starts
(hooks, fsmonitor, filters, a transport for missing objects). Whoever hands results on hands all of that on. So

* a commit is read object by object, and each one's bytes are hashed by us and compared with the hash that names them:
  from a commit's hash alone everything below it follows, whatever the repository is made to say;
* git works in an empty repository of ours, with the objects of the one that is asked about and nothing else of it:
  no configuration, no references, no attributes, no hooks, no index flags.

What remains of the repository is which commit it is at, where its objects are, and the names in its index.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vipo.errors import VipoError

# Of the variables that steer git, the user's own: where it may look, and what the machine's configuration is.
_KEPT = re.compile(
    r"GIT_(CEILING_DIRECTORIES|DISCOVERY_ACROSS_FILESYSTEM|TEST_ASSUME_DIFFERENT_OWNER"
    r"|CONFIG_(GLOBAL|SYSTEM|NOSYSTEM|COUNT|KEY_\d+|VALUE_\d+))"
)
_FIXED = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_REPLACE_OBJECTS": "1",
    # What is not here is not fetched: the repository would say by which program.
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}
QUIET = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


class GitError(VipoError):
    """What git was asked cannot be told; the message says why."""


class MissingObject(GitError):
    """The repository lacks an object that its history names, as a shallow or partial clone does."""


class ForgedObject(GitError):
    """An object's content is not what its name says, or cannot be read: the repository was damaged or tampered with."""


@dataclass(frozen=True)
class Repository:
    """A repository as git finds it.

    Attributes:
        top: the folder that holds ``.git``, without links.
        objects: folder of its objects.
        exclude: file with the patterns of names that its user wants ignored.
        head: hash of the commit that it is at; None before the first.
    """

    top: Path
    objects: Path
    exclude: Path
    head: str | None


def find_repository(root: Path) -> Repository | None:
    """The repository that holds the folder `root`; None without git, outside of one, or where git refuses it."""
    found = ask_git(root, "rev-parse", "--absolute-git-dir", "--git-path", "objects", "--git-path", "info/exclude")
    top = _top(root)
    if found is None or top is None:
        return None
    folder, objects, exclude = ((root / os.fsdecode(line)).resolve() for line in found.removesuffix(b"\n").split(b"\n"))
    if _pointed_at(top / ".git") != folder:
        return None
    head = ask_git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    return Repository(top, objects, exclude, None if head is None else head.decode().strip())


def repository_problem(root: Path) -> str | None:
    """What git says where it does not read the repository that `root` is; None where it does, or there is none."""
    if not (root / ".git").exists():
        return None
    try:
        done = run_git(["-C", str(root), "rev-parse", "--git-dir"], git_environment())
    except FileNotFoundError:
        return "git is not installed"
    return None if done.returncode == 0 else " ".join(os.fsdecode(done.stderr).split())


def is_tracked(folder: Path, name: str) -> bool:
    """Whether the repository that holds `folder` tracks the file `name` in it."""
    return ask_git(folder, "ls-files", "--error-unmatch", "--", f":(literal){name}") is not None


# ---- running it -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def empty_repository(repository: Repository, settings: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """The environment of a repository of ours that has another one's objects and commit, to read, and nothing else."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("refs", "objects/info"):
            (folder / part).mkdir(parents=True)
        # Quoted as git reads it, whatever the path holds.
        quoted = b'"' + b"".join(b"\\%03o" % byte for byte in os.fsencode(repository.objects)) + b'"\n'
        (folder / "objects/info/alternates").write_bytes(quoted)
        (folder / "HEAD").write_text(f"{repository.head or 'ref: refs/heads/none'}\n")
        sha256 = repository.head is not None and len(repository.head) == 64
        lines = ["[core]", f"\trepositoryformatversion = {int(sha256)}", "\tbare = false", *settings]
        lines += ["\tautocrlf = false", "\tcommitGraph = false", "\tsparseCheckout = false", "\tignoreStat = false"]
        lines += ["[extensions]", "\tobjectFormat = sha256"] if sha256 else []
        (folder / "config").write_text("\n".join(lines) + "\n")
        yield {**git_environment(), "GIT_DIR": name}


def git_environment() -> dict[str, str]:
    """The process's own, without what would steer git elsewhere."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or _KEPT.fullmatch(key)}
    return kept | _FIXED


def ask_git(folder: Path, *arguments: str) -> bytes | None:
    """What a command that only reads prints in the repository itself; None where it fails, or git is missing."""
    environment, top = git_environment(), _top(folder)
    if top is not None:
        # core.worktree may name any folder; what counts is where the repository lies.
        environment["GIT_WORK_TREE"] = str(top)
    try:
        done = run_git(["-C", str(folder), *QUIET, *arguments], environment)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def run_git(
    arguments: Sequence[str], environment: Mapping[str, str], given: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Git with an environment and an input, whatever becomes of it."""
    return subprocess.run(["git", *arguments], capture_output=True, env=environment, input=given or b"")


def _top(folder: Path) -> Path | None:
    place = folder.resolve()
    return next((parent for parent in (place, *place.parents) if (parent / ".git").exists()), None)


def _pointed_at(path: Path) -> Path:
    """Git's own folder, which ``.git`` is, or names where it is a file (of a worktree or submodule)."""
    if path.is_file():
        named = path.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("gitdir:").strip()
        return (path.parent / named).resolve()
    return path.resolve()
