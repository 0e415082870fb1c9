"""One small real experiment for all tests of the audit, in three states: not anchored, committed, signed."""

import shutil
from pathlib import Path

import pytest
from audit_fixture import EXPERIMENT, build_project, git, inside, new_key, write_lock


@pytest.fixture(scope="session")
def finished(tiny_generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose experiment has run; nothing anchors it."""
    root = tmp_path_factory.mktemp("finished") / "project"
    root.mkdir()
    build_project(root, tiny_generator)
    return root


@pytest.fixture(scope="session")
def locked(finished: Path) -> Path:
    """The same with a committed dvc.lock."""
    root = Path(shutil.copytree(finished, finished.with_name("locked")))
    write_lock(root)
    git(root, "add", "dvc.lock")
    git(root, "commit", "--quiet", "-m", "results")
    return root


@pytest.fixture(scope="session")
def signed(finished: Path) -> Path:
    """The same with a signed crate; `ada` may sign."""
    root = Path(shutil.copytree(finished, finished.with_name("signed")))
    key, _ = new_key(root.parent, "ada")
    from vipo.provenance import sign_file
    from vipo.provenance.crate import write_crate

    with inside(root):
        sign_file(write_crate(root / EXPERIMENT, root), key)
    return root
