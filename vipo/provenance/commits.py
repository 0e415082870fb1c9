"""What a commit holds, read object by object, each of which is checked against the hash that names it."""

import contextlib
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from vipo.provenance.git import QUIET, ForgedObject, MissingObject, Repository, empty_repository, find_repository

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


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
    with empty_repository(repository) as environment:
        # No configuration at all: none is needed, and a user's cannot help.
        bare = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", *QUIET, "-c", "core.commitGraph=false", "cat-file", "--batch"]
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
