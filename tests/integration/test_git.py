"""Whatever a repository is set up to say, what a commit holds and what a working tree holds beside it is the truth."""

import hashlib
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from audit_fixture import EXPERIMENT, audited, git, write_lock

from vipo.provenance.commits import commit_file, commit_files, has_commit, is_whole, last_change
from vipo.provenance.environment import git_state, package_sha256_at
from vipo.provenance.git import ForgedObject, MissingObject, find_repository
from vipo.provenance.working_tree import working_tree

_FILES = {"dvc.lock": b"honest\n", "vipo/a.py": b"x = 1\n", "vipo/b/c.py": b"y = 1\n", "code.py": b"z = 1\n"}


def _write(root: Path, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("honest") / "repository"
    for name, content in _FILES.items():
        _write(root, name, content)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    _write(root, "notes.txt", b"later\n")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "second")
    return root


@pytest.fixture
def root(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "repository"))


def _object(root: Path, kind: str, content: bytes) -> str:
    command = ["git", "-C", str(root), "hash-object", "-w", "-t", kind, "--stdin"]
    return subprocess.run(command, input=content, check=True, capture_output=True, text=False).stdout.decode().strip()


def _tampered_commit(root: Path) -> str:
    """A commit like HEAD with another dvc.lock and package, on no branch."""
    head = git(root, "rev-parse", "HEAD")
    for name in ("dvc.lock", "vipo/a.py"):
        (root / name).write_bytes(b"tampered\n")
    git(root, "commit", "--quiet", "-am", "tampered")
    other = git(root, "rev-parse", "HEAD")
    git(root, "reset", "--quiet", "--hard", head)
    return other


def _replaced_commit(root: Path) -> None:
    git(root, "replace", "HEAD", _tampered_commit(root))


def _replaced_tree(root: Path) -> None:
    git(root, "replace", "HEAD^{tree}", f"{_tampered_commit(root)}^{{tree}}")


def _replaced_blob(root: Path) -> None:
    for name in ("dvc.lock", "vipo/a.py"):
        git(root, "replace", git(root, "rev-parse", f"HEAD:{name}"), _object(root, "blob", b"tampered\n"))


def _attributes(root: Path) -> None:
    (root / ".git" / "info" / "attributes").write_text("*.py export-ignore export-subst filter=t\n* text eol=crlf\n")
    git(root, "config", "filter.t.smudge", "sed s/1/2/")
    git(root, "config", "core.autocrlf", "true")


def _working_tree(root: Path) -> None:
    """The repository's own word that its files lie one folder higher."""
    git(root, "config", "core.worktree", str(root.parent))


def _included(root: Path) -> None:
    (root / ".git" / "more").write_text(f"[core]\n\tworktree = {root.parent}\n\tbare = false\n")
    (root / ".git" / "config").write_text(
        (root / ".git" / "config").read_text() + f'[includeIf "gitdir:{root}/"]\n\tpath = more\n'
    )


def _linked(root: Path) -> None:
    (root / ".git").rename(root.parent / "elsewhere")
    (root / ".git").symlink_to(root.parent / "elsewhere")


def _alternates(root: Path) -> None:
    objects = root / ".git" / "objects"
    (root.parent / "objects").mkdir()
    for part in [path for path in objects.iterdir() if len(path.name) == 2]:
        part.rename(root.parent / "objects" / part.name)
    (objects / "info" / "alternates").write_text(f"{root.parent / 'objects'}\n")


def _graph(root: Path) -> None:
    """The commit-graph of a history whose HEAD has the tampered tree, under HEAD's name."""
    other = _tampered_commit(root)
    head, trees = git(root, "rev-parse", "HEAD"), [git(root, "rev-parse", f"{c}^{{tree}}") for c in ("HEAD", other)]
    git(root, "commit-graph", "write", "--reachable")
    path = root / ".git" / "objects" / "info" / "commit-graph"
    content = path.read_bytes()
    forged = content[:-20].replace(bytes.fromhex(trees[0]), bytes.fromhex(trees[1]))
    assert forged != content[:-20]
    assert bytes.fromhex(head) in forged
    path.chmod(0o644)
    path.write_bytes(forged + hashlib.sha1(forged).digest())


_LIES: Mapping[str, Callable[[Path], None]] = {
    "a replaced commit": _replaced_commit,
    "a replaced tree": _replaced_tree,
    "a replaced blob": _replaced_blob,
    "attributes and filters": _attributes,
    "another working tree": _working_tree,
    "an included configuration": _included,
    "a linked repository": _linked,
    "objects elsewhere": _alternates,
    "a forged commit-graph": _graph,
}


@pytest.mark.parametrize("lie", _LIES)
def test_a_commit_holds_what_its_hash_says(root: Path, lie: str) -> None:
    head, package = git(root, "rev-parse", "HEAD"), package_sha256_at(root, git(root, "rev-parse", "HEAD"))
    first = git(root, "rev-parse", "HEAD~1")
    _LIES[lie](root)
    repository = find_repository(root)
    assert repository is not None
    assert (repository.top, repository.head) == (root.resolve(), head)
    for name, content in _FILES.items():
        assert commit_file(root, head, name) == content
    assert commit_file(root / "vipo", head, "b/c.py") == _FILES["vipo/b/c.py"]
    assert commit_files(root, head, "vipo") == {"a.py": _FILES["vipo/a.py"], "b/c.py": _FILES["vipo/b/c.py"]}
    assert package_sha256_at(root, head) == package
    assert last_change(root, "dvc.lock") == first
    assert has_commit(root, head)
    assert is_whole(root)
    assert commit_file(root, head, "nothing") is None
    assert commit_file(root, head, "../repository/dvc.lock") is None
    assert commit_files(root, head, "code.py") is None


def test_an_object_under_another_s_name_is_found(root: Path) -> None:
    head = git(root, "rev-parse", "HEAD")
    for name, kind in (("HEAD:dvc.lock", "blob"), ("HEAD:vipo", "tree"), ("HEAD~1", "commit")):
        copy = Path(shutil.copytree(root, root.with_name(kind)))
        forged = git(copy, "rev-parse", name)
        path = copy / ".git" / "objects" / forged[:2] / forged[2:]
        path.chmod(0o644)
        path.write_bytes(zlib.compress(b"blob 9\0tampered\n"))
        with pytest.raises(ForgedObject, match=forged):
            commit_file(copy, head, "dvc.lock") if kind == "blob" else (
                commit_files(copy, head, "vipo") if kind == "tree" else has_commit(copy, forged)
            )


def test_history_is_what_the_commits_say(root: Path) -> None:
    head, first = git(root, "rev-parse", "HEAD"), git(root, "rev-parse", "HEAD~1")
    clone = root.with_name("shallow")
    git(root.parent, "clone", "--quiet", "--depth", "1", f"file://{root}", str(clone))
    assert not is_whole(clone)
    assert last_change(clone, "dvc.lock") == head
    assert not has_commit(clone, first)
    assert commit_file(clone, first, "dvc.lock") is None
    (root / ".git" / "info" / "grafts").write_text(f"{head}\n")
    (root / ".git" / "shallow").write_text(f"{head}\n")
    assert is_whole(root)
    assert last_change(root, "dvc.lock") == first


def test_what_a_partial_clone_lacks_is_not_fetched(root: Path) -> None:
    git(root, "config", "uploadpack.allowFilter", "true")
    clone, ran = root.with_name("partial"), root.parent / "ran"
    git(root.parent, "clone", "--quiet", "--filter=blob:none", "--no-checkout", f"file://{root}", str(clone))
    git(clone, "config", "remote.origin.url", f"ext::touch {ran}")
    git(clone, "config", "protocol.ext.allow", "always")
    with pytest.raises(MissingObject, match="a shallow or partial clone"):
        commit_file(clone, git(clone, "rev-parse", "HEAD"), "dvc.lock")
    assert has_commit(clone, git(clone, "rev-parse", "HEAD"))
    assert not ran.exists()


# ---- the working tree ----------------------------------------------------------------------------------------------


def _flagged(root: Path) -> None:
    git(root, "update-index", "--assume-unchanged", "code.py")
    git(root, "update-index", "--skip-worktree", "vipo/a.py")


def _cleaned(root: Path) -> None:
    """A filter that gives back what was committed."""
    git(root, "config", "filter.t.clean", "sed s/2/1/")
    (root / ".git" / "info" / "attributes").write_text("*.py filter=t\n")


def _sparse(root: Path) -> None:
    git(root, "config", "core.sparseCheckout", "true")
    (root / ".git" / "info" / "sparse-checkout").write_text("notes.txt\n")
    git(root, "update-index", "--skip-worktree", "code.py", "vipo/a.py")


def _unwatched(root: Path) -> None:
    """A monitor that saw nothing, and times that changed nothing."""
    hook = root / ".git" / "monitor"
    hook.write_text("#!/bin/sh\nprintf 'token\\0'\n")
    hook.chmod(0o755)
    git(root, "config", "core.fsmonitor", str(hook))
    git(root, "config", "core.ignoreStat", "true")
    git(root, "update-index", "--fsmonitor")
    git(root, "update-index", "--fsmonitor-valid", "code.py", "vipo/a.py")


def _drivers(root: Path) -> None:
    git(root, "config", "diff.t.textconv", "true")
    git(root, "config", "diff.t.command", "true")
    git(root, "config", "diff.external", "true")
    (root / ".git" / "info" / "attributes").write_text("*.py diff=t\n")


_BLINDS: Mapping[str, Callable[[Path], None]] = {
    "index flags": _flagged,
    "a cleaning filter": _cleaned,
    "a sparse checkout": _sparse,
    "a file system monitor": _unwatched,
    "diff drivers": _drivers,
    "another working tree": _working_tree,
    "a replaced tree": lambda root: git(root, "replace", "HEAD^{tree}", _changed_tree(root)),
    "a linked repository": _linked,
}


def _changed_tree(root: Path) -> str:
    """The tree that the changed files would give, so that nothing differs from it."""
    index = {"GIT_INDEX_FILE": str(root / ".git" / "other"), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    for command in (["read-tree", "HEAD"], ["add", "-u"]):
        subprocess.run(["git", "-C", str(root), *command], check=True, env=index)
    told = subprocess.run(["git", "-C", str(root), "write-tree"], check=True, env=index, capture_output=True, text=True)
    return told.stdout.strip()


@pytest.mark.parametrize("blind", _BLINDS)
def test_a_changed_file_is_seen(root: Path, tmp_path: Path, blind: str) -> None:
    clean = git_state(root)
    assert clean["dirty"] is False
    if blind != "a replaced tree":
        _BLINDS[blind](root)
        assert git_state(root) == clean
    for name in ("code.py", "vipo/a.py"):
        (root / name).write_bytes(_FILES[name].replace(b"1", b"2"))
    if blind == "a replaced tree":
        _BLINDS[blind](root)
    state = git_state(root)
    assert (state["commit"], state["dirty"], state["untracked"]) == (clean["commit"], True, {})
    honest = Path(shutil.copytree(root, tmp_path / "told", ignore=shutil.ignore_patterns(".git")))
    git(honest, "init", "--quiet")
    (honest / "code.py").write_bytes(_FILES["code.py"])
    (honest / "vipo/a.py").write_bytes(_FILES["vipo/a.py"])
    git(honest, "add", ".")
    git(honest, "commit", "--quiet", "-m", "the same files")
    for name in ("code.py", "vipo/a.py"):
        (honest / name).write_bytes((root / name).read_bytes())
    assert state["diff_sha256"] == git_state(honest)["diff_sha256"]


@pytest.mark.parametrize(
    ("attributes", "changed"),
    [
        ("*.py text", _FILES["code.py"].replace(b"\n", b"\r\n")),
        ("*.py text eol=crlf", _FILES["code.py"].replace(b"\n", b"\r\n")),
        ("*.py ident", b"z = '$Id: ' and 2 and '$'\n"),
        ("*.py working-tree-encoding=UTF-16LE", _FILES["code.py"].decode().encode("utf-16-le")),
        ("*.py -diff", b"z = 2\n"),
        ("*.py binary", b"z = 2\n"),
    ],
)
def test_no_attribute_hides_other_bytes(root: Path, attributes: str, changed: bytes) -> None:
    """Those of the commit count as little as others; applied to it, the diff gives the bytes that lie there."""
    committed = b"z = '$Id$'\n" if "ident" in attributes else _FILES["code.py"]
    (root / "code.py").write_bytes(committed)
    git(root, "add", ".")
    (root / ".gitattributes").write_text(f"{attributes}\n")
    git(root, "add", ".gitattributes")
    git(root, "commit", "--quiet", "-m", "attributes")
    assert git_state(root)["dirty"] is False
    (root / "code.py").write_bytes(changed)
    with working_tree(root) as tree:
        assert tree is not None
        diff = tree.tracked
    assert git_state(root)["dirty"] is True
    bare = root.parent / "bare"
    _write(bare, "code.py", committed)
    subprocess.run(["git", "apply"], input=diff, cwd=bare, check=True, env={"PATH": os.environ["PATH"]})
    assert (bare / "code.py").read_bytes() == changed


def test_a_filter_of_this_machine_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Git LFS has them: what is committed stands for what lies there, which is no change then."""
    machine = root.parent / "machine"
    machine.write_text('[filter "stored"]\n\tclean = sha256sum\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(machine))
    (root / ".gitattributes").write_text("*.bin filter=stored\n")
    (root / "weights.bin").write_bytes(b"large")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "stored")
    assert git(root, "show", "HEAD:weights.bin").split()[0] == hashlib.sha256(b"large").hexdigest()
    assert git_state(root)["dirty"] is False
    (root / "weights.bin").write_bytes(b"Large")
    assert git_state(root)["dirty"] is True


def test_no_program_that_a_repository_names_is_run(root: Path) -> None:
    ran = root.parent / "ran"
    program = root.parent / "program"
    program.write_text(f"#!/bin/sh\necho $0 $@ >> {ran}\ncat\n")
    program.chmod(0o755)
    hooks = root.parent / "hooks"
    hooks.mkdir()
    for hook in ("post-index-change", "fsmonitor-watchman", "reference-transaction", "pre-commit"):
        (hooks / hook).symlink_to(program)
    for key in (
        "core.fsmonitor", "core.pager", "pager.diff", "diff.external", "diff.t.command", "diff.t.textconv",
        "filter.t.clean", "filter.t.smudge", "filter.t.process", "core.sshCommand", "credential.helper", "core.editor",
        "gpg.program", "core.alternateRefsCommand", "alias.diff", "interactive.diffFilter",
    ):  # fmt: skip
        git(root, "config", key, str(program))
    git(root, "config", "core.hooksPath", str(hooks))
    (root / ".gitattributes").write_text("* filter=t diff=t\n")
    (root / "code.py").write_bytes(b"changed\n")
    ran.unlink(missing_ok=True)
    state = git_state(root)
    assert (state["dirty"], state["untracked"]) == (True, {".gitattributes": 18})
    assert commit_file(root, state["commit"], "code.py") == _FILES["code.py"]
    assert last_change(root, "code.py") is not None
    assert not ran.exists(), ran.read_text()


def test_the_surroundings_name_no_other_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = git_state(root)
    for name in ("DIR", "WORK_TREE", "INDEX_FILE", "OBJECT_DIRECTORY", "COMMON_DIR", "REPLACE_REF_BASE", "NAMESPACE"):
        monkeypatch.setenv(f"GIT_{name}", str(root.parent / "other"))
    for name in ("GRAFT_FILE", "SHALLOW_FILE", "EXTERNAL_DIFF", "ATTR_SOURCE", "CONFIG", "CONFIG_PARAMETERS", "PREFIX"):
        monkeypatch.setenv(f"GIT_{name}", str(root.parent / "other"))
    assert git_state(root) == expected
    assert commit_file(root, expected["commit"], "dvc.lock") == b"honest\n"


def test_files_that_were_added_but_not_committed_are_told(root: Path) -> None:
    (root / ".gitignore").write_text("*.log\n")
    (root / "forced.log").write_text("forced\n")
    git(root, "add", "--force", "forced.log")
    (root / ".git" / "info" / "exclude").write_text("mine.txt\n")
    (root / "mine.txt").write_text("mine\n")
    state = git_state(root)
    assert (state["dirty"], state["untracked"]) == (True, {".gitignore": 6})


# ---- an audit ------------------------------------------------------------------------------------------------------


def test_a_replaced_lock_anchors_nothing(locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed result, its lock, and a repository that shows that lock in place of the committed one."""
    monkeypatch.setattr("vipo.audit.audit.check_numbers", lambda examination: None)
    root = Path(shutil.copytree(locked, tmp_path / "project"))
    commit, name = git(root, "rev-parse", "HEAD"), "evaluation/vipo-s0/maps.safetensors"
    content = bytearray((root / EXPERIMENT / name).read_bytes())
    content[-1] ^= 1
    (root / EXPERIMENT / name).write_bytes(content)
    write_lock(root)
    git(root, "commit", "--quiet", "-am", "tampered")
    git(root, "replace", commit, "HEAD")
    git(root, "update-ref", "HEAD", commit)
    assert git(root, "status", "--porcelain", "--untracked-files=no") == ""
    audit = audited(root)
    assert audit.verdict == "broken"
    assert [anchor.by for anchor in audit.anchors] == [commit]
    broken = {finding.artifact: finding.message for finding in audit.findings if finding.severity == "broken"}
    assert "is not the committed one" in broken["dvc.lock"]
    assert broken[name].startswith("changed")
