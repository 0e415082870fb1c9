"""What a working tree holds beside its commit."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vipo.provenance.git import QUIET, GitError, ask_git, empty_repository, find_repository, run_git

_CARRIED = ("filemode", "symlinks", "ignorecase", "precomposeunicode")
# What runs are the bytes that lie there: with line ends, keywords or an encoding converted they are not the commit's.
_AS_IT_LIES = "* -text -ident !working-tree-encoding\n"
# Written by the workflow itself, so their change is no change of the code.
_NOT_CODE = (":(exclude)results", ":(exclude)dvc.lock")


class WorkingTree:
    """A working tree against its commit: every file is read, whatever index and configuration say of it.

    Files below ``results/`` and ``dvc.lock`` do not count, for the workflow writes them, nor do files that git ignores.
    Of ``.gitattributes`` filters alone count, which this machine's own configuration must define (Git LFS does).

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
        done = run_git(["-C", str(self._root), *QUIET, *arguments], {**self._environment, **variables})
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
    entries = None if repository is None else ask_git(root, "ls-files", "--full-name", "--stage", "-z", ":/")
    if repository is None or repository.head is None or entries is None:
        yield None
        return
    carried = ask_git(root, "config", "--get-regexp", rf"^core\.({'|'.join(_CARRIED)})$") or b""
    told = dict(line.split(" ", 1) for line in os.fsdecode(carried).splitlines() if " " in line)
    settings = [f"\t{name.partition('.')[2]} = {value}" for name, value in told.items() if value in ("true", "false")]
    with empty_repository(repository, settings) as environment:
        environment["GIT_WORK_TREE"] = str(repository.top)
        # It comes before every .gitattributes.
        attributes = Path(environment["GIT_DIR"]) / "info" / "attributes"
        attributes.parent.mkdir()
        attributes.write_text(_AS_IT_LIES)
        # The names alone: no flag that says a file is as it was, and no time to believe it by.
        run_git(["-C", str(repository.top), "update-index", "-z", "--index-info"], environment, entries)
        # Its status only says that there are differences.
        run_git(["-C", str(repository.top), "update-index", "-q", "--refresh"], environment)
        yield WorkingTree(root, repository.head, environment, repository.exclude)
