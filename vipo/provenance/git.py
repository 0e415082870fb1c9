"""The one place that runs git: what commits hold, and what a working tree holds beside its commit.

A repository can be set up to lie: replaced objects, grafts, a shallow boundary, a forged commit-graph or object,
another working tree, index flags that hide a change, attributes and filters that rewrite it, programs that git starts
(hooks, fsmonitor, filters, a transport for missing objects). Whoever hands results on hands all of that on. So

* a commit is read object by object, and each object's bytes are hashed here and compared with the hash that names them:
  from a commit's hash alone everything below it follows, whatever the repository is made to say;
* git works in an empty repository of ours, with the objects of the one that is asked about and nothing else of it:
  no configuration, no references, no attributes, no hooks, no index flags.

What remains of the repository is which commit it is at, where its objects are, and the names in its index.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

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
_QUIET = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CARRIED = ("filemode", "symlinks", "ignorecase", "precomposeunicode")
# Written by the workflow itself, so their change is no change of the code.
_NOT_CODE = (":(exclude)results", ":(exclude)dvc.lock")


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
    found = _ask(root, "rev-parse", "--absolute-git-dir", "--git-path", "objects", "--git-path", "info/exclude")
    top = _top(root)
    if found is None or top is None:
        return None
    folder, objects, exclude = ((root / os.fsdecode(line)).resolve() for line in found.removesuffix(b"\n").split(b"\n"))
    if _pointed_at(top / ".git") != folder:
        return None
    head = _ask(root, "rev-parse", "--verify", "--quiet", "HEAD")
    return Repository(top, objects, exclude, None if head is None else head.decode().strip())


def repository_problem(root: Path) -> str | None:
    """What git says where it does not read the repository that `root` is; None where it does, or there is none."""
    if not (root / ".git").exists():
        return None
    try:
        done = _run(["-C", str(root), "rev-parse", "--git-dir"], _environment())
    except FileNotFoundError:
        return "git is not installed"
    return None if done.returncode == 0 else " ".join(os.fsdecode(done.stderr).split())


def is_tracked(folder: Path, name: str) -> bool:
    """Whether the repository that holds `folder` tracks the file `name` in it."""
    return _ask(folder, "ls-files", "--error-unmatch", "--", f":(literal){name}") is not None


# ---- what a commit holds --------------------------------------------------------------------------------------------


def has_commit(root: Path, commit: str) -> bool:
    """Whether the repository of `root` holds a commit.

    Raises:
        ForgedObject: it holds something else under that hash.
    """
    with _objects(root) as objects:
        if objects is None:
            return False
        try:
            objects.commit(commit)
        except MissingObject:
            return False
        return True


def is_whole(root: Path) -> bool:
    """Whether the history of `root` reaches back to its beginnings; false for a shallow clone.

    Raises:
        ForgedObject: a commit is not what its hash says.
    """
    with _objects(root) as objects:
        if objects is None or objects.head is None:
            return True
        seen, left = {objects.head}, [objects.head]
        while left:
            try:
                _, parents = objects.commit(left.pop())
            except MissingObject:
                return False
            left += [parent for parent in parents if parent not in seen]
            seen.update(parents)
        return True


def commit_file(root: Path, commit: str, path: str) -> bytes | None:
    """The content of a file as a commit holds it; None where it holds none, or there is no such commit here.

    Args:
        root: a folder of the repository's working tree.
        commit: its full hash.
        path: relative to `root`.

    Raises:
        MissingObject: a shallow or partial clone lacks it.
        ForgedObject: an object on the way is not what its hash says.
    """
    with _objects(root) as objects:
        found = None if objects is None else objects.entry(commit, path)
        return None if objects is None or found is None else objects.blob(found)


def commit_files(root: Path, commit: str, folder: str) -> dict[str, bytes] | None:
    """The contents of all files in a folder of a commit, by their path in it; links and submodules are left out.

    Returns:
        None where the commit holds no such folder, or is not here.

    Raises:
        MissingObject, ForgedObject: as `commit_file`.
    """
    with _objects(root) as objects:
        found = None if objects is None else objects.entry(commit, folder)
        if objects is None or found is None or found.kind != "tree":
            return None
        return dict(objects.files(found.name, ""))


def last_change(root: Path, path: str) -> str | None:
    """The commit that gave a file the content that the commit at HEAD holds; None where that holds none.

    Raises:
        MissingObject, ForgedObject: as `commit_file`.
    """
    with _objects(root) as objects:
        commit = None if objects is None else objects.head
        if objects is None or commit is None or (entry := objects.entry(commit, path)) is None:
            return None
        while True:
            _, parents = objects.commit(commit)
            for parent in parents:
                # Where the history ends in a shallow clone, this is the oldest that is known to hold it.
                with contextlib.suppress(MissingObject):
                    if objects.entry(parent, path) == entry:
                        commit = parent
                        break
            else:
                return commit


@dataclass(frozen=True)
class _Entry:
    """What a tree says of a name."""

    mode: str
    name: str

    @property
    def kind(self) -> str:
        return "tree" if self.mode.lstrip("0") == "40000" else "blob"


class _Objects:
    """The objects of a repository, each checked against its name."""

    def __init__(self, repository: Repository, prefix: PurePosixPath, asked: IO[bytes], answers: IO[bytes]) -> None:
        self.head = repository.head
        self._prefix, self._asked, self._answers = prefix, asked, answers
        self._commits: dict[str, tuple[str, list[str]]] = {}
        self._trees: dict[str, dict[str, _Entry]] = {}

    def commit(self, name: str) -> tuple[str, list[str]]:
        """Its tree and its parents."""
        if name not in self._commits:
            header = self._read(name, "commit").split(b"\n\n", 1)[0].decode(errors="replace").split("\n")
            named = [line.partition(" ") for line in header]
            # Only these come first; a signature or a message may hold such a line later.
            (key, _, tree), parents = named[0], []
            if key != "tree":
                raise ForgedObject(f"git: the commit {name} names no tree")
            for key, _, value in named[1:]:
                if key != "parent":
                    break
                parents.append(value)
            self._commits[name] = tree, parents
        return self._commits[name]

    def entry(self, commit: str, path: str) -> _Entry | None:
        """What a commit holds at a path relative to the folder that was asked about."""
        try:
            tree, _ = self.commit(commit)
        except MissingObject:
            return None
        parts = (self._prefix / path).parts
        if ".." in parts or PurePosixPath(path).is_absolute():
            return None
        found: _Entry | None = _Entry("40000", tree)
        for part in parts:
            if found is None or found.kind != "tree":
                return None
            found = self._tree(found.name).get(part)
        return found

    def blob(self, entry: _Entry) -> bytes | None:
        """Content of a file or link; None for anything else."""
        is_file = entry.mode.startswith("1") and entry.mode != "160000"
        return self._read(entry.name, "blob") if is_file else None

    def files(self, tree: str, place: str) -> Iterator[tuple[str, bytes]]:
        """All files below a tree."""
        for name, entry in self._tree(tree).items():
            if entry.kind == "tree":
                yield from self.files(entry.name, f"{place}{name}/")
            elif entry.mode.startswith("100"):
                yield f"{place}{name}", self._read(entry.name, "blob")

    def _tree(self, name: str) -> dict[str, _Entry]:
        if name not in self._trees:
            content, size, found = self._read(name, "tree"), len(name) // 2, {}
            while content:
                head, _, rest = content.partition(b"\0")
                mode, _, entry = head.partition(b" ")
                found[os.fsdecode(entry)] = _Entry(mode.decode(), rest[:size].hex())
                content = rest[size:]
            self._trees[name] = found
        return self._trees[name]

    def _read(self, name: str, kind: str) -> bytes:
        if not _HASH.fullmatch(name):
            raise ForgedObject(f"git: {name!r} is no hash of an object")
        try:
            self._asked.write(f"{name}\n".encode())
            self._asked.flush()
            header = self._answers.readline().split()
            if header[1:] == [b"missing"]:
                raise MissingObject(f"git: this repository lacks the object {name} (a shallow or partial clone?)")
            found, size = header[1].decode(), int(header[2])
            content = self._answers.read(size + 1)[:-1]
        # A pack or an object that git cannot read ends it.
        except (OSError, IndexError, ValueError) as error:
            raise ForgedObject(f"git: cannot read the object {name}; 'git fsck' says more") from error
        algorithm = hashlib.sha1 if len(name) == 40 else hashlib.sha256
        told = algorithm(f"{found} {len(content)}\0".encode() + content).hexdigest()
        if (found, told) != (kind, name):
            raise ForgedObject(f"git: the object {name} is not what its name says: this repository was tampered with")
        return content


@contextlib.contextmanager
def _objects(root: Path) -> Iterator[_Objects | None]:
    repository = find_repository(root)
    if repository is None:
        yield None
        return
    prefix = PurePosixPath(root.resolve().relative_to(repository.top).as_posix())
    with _empty_repository(repository) as environment:
        # No configuration at all: none is needed, and a user's cannot help.
        bare = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", *_QUIET, "-c", "core.commitGraph=false", "cat-file", "--batch"]
        with subprocess.Popen(
            command,
            env=environment | bare,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield _Objects(repository, prefix, process.stdin, process.stdout)
            finally:
                # It may have ended already.
                with contextlib.suppress(OSError):
                    process.stdin.close()
                process.stdout.close()


# ---- what a working tree holds beside its commit --------------------------------------------------------------------


class WorkingTree:
    """A working tree against its commit: every file is read, whatever index and configuration say of it.

    Files below ``results/`` and ``dvc.lock`` do not count, for the workflow writes them, nor do files that git ignores.

    Attributes:
        commit: that it is at.
        tracked: binary diff of the tracked files against it.
        untracked: bytes of the files that git does not track, by path relative to the folder.
    """

    def __init__(self, root: Path, commit: str, environment: Mapping[str, str], exclude: Path) -> None:
        self.commit = commit
        self._root, self._environment = root, environment
        self.tracked = self._diff("HEAD")
        patterns = ["--exclude-from", str(exclude)] if exclude.is_file() else []
        listed = self._git("ls-files", "--others", *patterns, "--exclude-standard", "-z", "--", ".", *_NOT_CODE)
        # A name that ends in a slash is another repository's folder; an editor's temporary file may be gone by now.
        names = sorted(name for name in os.fsdecode(listed).split("\0") if name and not name.endswith("/"))
        self.untracked = {name: (root / name).lstat().st_size for name in names if os.path.lexists(root / name)}

    def added(self, names: Sequence[str]) -> bytes:
        """Binary diff that adds untracked files."""
        if not names:
            return b""
        own = {"GIT_INDEX_FILE": f"{self._environment['GIT_DIR']}/added"}
        self._git("--literal-pathspecs", "add", "--intent-to-add", "--", *names, **own)
        return self._diff(**own)

    def _diff(self, *arguments: str, **variables: str) -> bytes:
        # Every option that a user's git configuration could change is set, so that one diff has one hash.
        return self._git(
            "-c", "core.quotePath=true", "-c", "diff.autoRefreshIndex=false",
            "diff", *arguments, "--binary", "--full-index", "--no-ext-diff", "--no-textconv", "--no-color",
            "--no-renames", "--diff-algorithm=myers", "--unified=3", "--src-prefix=a/", "--dst-prefix=b/",
            "--ignore-submodules=none", "--", ".", *_NOT_CODE,
            **variables,
        )  # fmt: skip

    def _git(self, *arguments: str, **variables: str) -> bytes:
        done = _run(["-C", str(self._root), *_QUIET, *arguments], {**self._environment, **variables})
        if done.returncode:
            told = " ".join(os.fsdecode(done.stderr).split())
            raise GitError(f"{self._root}: git cannot compare the working tree with its commit ({told})")
        return done.stdout


@contextlib.contextmanager
def working_tree(root: Path) -> Iterator[WorkingTree | None]:
    """The working tree that `root` is, or is a folder of; None without git, outside a repository or before a commit.

    Raises:
        GitError: git cannot compare it with its commit.
    """
    repository = find_repository(root)
    entries = None if repository is None else _ask(root, "ls-files", "--full-name", "--stage", "-z", ":/")
    if repository is None or repository.head is None or entries is None:
        yield None
        return
    carried = _ask(root, "config", "--get-regexp", rf"^core\.({'|'.join(_CARRIED)})$") or b""
    told = dict(line.split(" ", 1) for line in os.fsdecode(carried).splitlines() if " " in line)
    settings = [f"\t{name.partition('.')[2]} = {value}" for name, value in told.items() if value in ("true", "false")]
    with _empty_repository(repository, settings) as environment:
        environment["GIT_WORK_TREE"] = str(repository.top)
        # The names alone: no flag that says a file is as it was, and no time to believe it by.
        _run(["-C", str(repository.top), "update-index", "-z", "--index-info"], environment, entries)
        # Its status only says that there are differences.
        _run(["-C", str(repository.top), "update-index", "-q", "--refresh"], environment)
        yield WorkingTree(root, repository.head, environment, repository.exclude)


# ---- running git ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _empty_repository(repository: Repository, settings: Sequence[str] = ()) -> Iterator[dict[str, str]]:
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
        yield {**_environment(), "GIT_DIR": name}


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or _KEPT.fullmatch(key)}
    return kept | _FIXED


def _ask(folder: Path, *arguments: str) -> bytes | None:
    """What a command that only reads prints in the repository itself; None where it fails, or git is missing."""
    environment, top = _environment(), _top(folder)
    if top is not None:
        # core.worktree may name any folder; what counts is where the repository lies.
        environment["GIT_WORK_TREE"] = str(top)
    try:
        done = _run(["-C", str(folder), *_QUIET, *arguments], environment)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _run(
    arguments: Sequence[str], environment: Mapping[str, str], given: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
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
