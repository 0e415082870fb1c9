"""Full and read-only disks: small tmpfs mounts and read-only bind mounts, so root is needed, and its absence fails."""

import contextlib
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vipo.config.compose import repository_root
from vipo.provenance.files import StorageError, atomic_file, atomic_folder
from vipo.provenance.locks import run_lock
from vipo.provenance.superseded import set_aside
from vipo.training.checkpoints import list_checkpoints, load_checkpoint

pytestmark = pytest.mark.root

ROOT = repository_root()
PARTS = ROOT / "tests" / "e2e"
RUN = "demo/runs/grpo-s0"

Mount = Callable[..., Path]


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """``mount(size)`` gives a fresh tmpfs of that size, ``mount(folder)`` a read-only view of a folder."""
    assert os.geteuid() == 0, "mounts need root: run `make test-root` as root"
    mounted: list[Path] = []

    def new(what: str | Path) -> Path:
        point = tmp_path / f"mount{len(mounted)}"
        point.mkdir()
        if isinstance(what, Path):
            _run("mount", "--bind", what, point)
            mounted.append(point)
            _run("mount", "-o", "remount,ro,bind", point)
        else:
            _run("mount", "-t", "tmpfs", "-o", f"size={what}", "tmpfs", point)
            mounted.append(point)
        return point

    yield new
    for point in reversed(mounted):
        # Lazily: pages of embeddings may still be mapped.
        _run("umount", "-l", point)


@pytest.fixture
def vipo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``vipo(*arguments)`` runs the command in this process: exit status and stderr."""
    from vipo.cli import main

    monkeypatch.syspath_prepend(PARTS)

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vipo", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


def _refused(finished: tuple[int, str], *told: str) -> None:
    code, shown = finished
    assert code == 1, shown
    assert "Traceback" not in shown
    # What comes before is progress bars.
    *before, message = shown.splitlines()
    assert message.startswith("error: ")
    assert not any(line.startswith("error: ") for line in before)
    assert all(text in message for text in told), message


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    reward = ['reward.terms=[{name: "bad_rewards:FillsDisk"}]', 'evaluation.rewards=["bad_rewards:FillsDisk"]']
    return [*tiny_overrides, "arm=grpo", *reward]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _artifacts(results: Path) -> dict[str, bytes]:
    run = results / RUN
    found = [run / "metrics.jsonl", run / "config.yaml", *run.glob("weights/**/*.*"), *run.glob("updates/**/*.*")]
    assert len(found) >= 4
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def _fill(folder: Path, pages_left: int = 0) -> None:
    disk = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes((disk.f_bavail - pages_left) * disk.f_frsize))


def test_full_disk_during_a_checkpoint_and_the_same_bytes_after_it_is_freed(
    mount: Mount, vipo: Callable[..., tuple[int, str]], prepared: Path, overrides: list[str], tmp_path: Path
) -> None:
    disk = mount("4m")
    shutil.copytree(prepared / "demo", disk / "demo")
    # Two calls an update after the trial on one picture: full while update 3 of 4 is scored.
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(PARTS),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "FILL": str(disk),
        "FILL_AFTER": "6",
    }
    finished = subprocess.run(
        [Path(sys.executable).with_name("vipo"), "train", *overrides, "--results", disk],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (disk / "filler").stat().st_size > 2**20
    _refused(
        (finished.returncode, finished.stderr),
        f"{RUN}/checkpoints/000003",
        "No space left on device",
        "free disk space",
        "unchanged",
    )
    run = disk / RUN
    assert [folder.name for folder in list_checkpoints(run / "checkpoints")] == ["000002", "000001"]
    for folder in list_checkpoints(run / "checkpoints"):
        load_checkpoint(folder)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000001", "000002"]
    assert not (run / "weights").exists()
    assert not (run / "provenance.json").exists()
    assert vipo("evaluate", *overrides, "--results", disk)[0] == 1

    # Still full: refused before the first computation, and nothing is lost.
    _refused(vipo("train", *overrides, "--results", disk), RUN, "MiB free", "free space")
    _run("mount", "-o", "remount,size=16m", disk)
    code, shown = vipo("train", *overrides, "--results", disk)
    assert code == 0, shown
    undisturbed = shutil.copytree(prepared, tmp_path / "undisturbed")
    assert vipo("train", *overrides, "--results", undisturbed)[0] == 0
    assert _artifacts(disk) == _artifacts(undisturbed)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_between_checkpoints(
    mount: Mount,
    vipo: Callable[..., tuple[int, str]],
    prepared: Path,
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The run's records are what fails first; no thread of a library prints a traceback of its own."""
    disk = mount("4m")
    shutil.copytree(prepared / "demo", disk / "demo")
    arguments = [*overrides, "training.updates=40", "training.checkpoint_every=40"]
    monkeypatch.setenv("FILL", str(disk))
    monkeypatch.setenv("FILL_AFTER", "8")
    _refused(vipo("train", *arguments, "--results", disk), RUN, "No space left on device", "free disk space")
    assert not (disk / RUN / "provenance.json").exists()
    monkeypatch.delenv("FILL")
    (disk / "filler").unlink()
    assert vipo("train", *arguments, "--results", disk)[0] == 0
    undisturbed = shutil.copytree(prepared, tmp_path / "undisturbed")
    assert vipo("train", *arguments, "--results", undisturbed)[0] == 0
    assert _artifacts(disk) == _artifacts(undisturbed)


def test_full_disk_in_the_other_stages(
    mount: Mount, vipo: Callable[..., tuple[int, str]], prepared: Path, overrides: list[str]
) -> None:
    disk = mount("8m")
    _fill(disk)
    _refused(vipo("prepare", *overrides, "--results", disk), "No space left on device", "free")
    (disk / "filler").unlink()
    assert vipo("prepare", *overrides, "--results", disk)[0] == 0
    _fill(disk)
    _refused(vipo("encode", *overrides, "--results", disk), "demo/embeddings", "No space left on device", "free")
    assert not list((disk / "demo").glob("embeddings/[!.]*"))
    (disk / "filler").unlink()
    for stage in ("encode", "train"):
        code, shown = vipo(stage, *overrides, "--results", disk)
        assert code == 0, shown
    _fill(disk)
    _refused(vipo("evaluate", *overrides, "--results", disk), "demo/samples/grpo-s0", "No space left on device", "free")
    assert not [path for path in (disk / "demo").glob("samples/grpo-s0/**/[!.]*") if path.is_file()]
    (disk / "filler").unlink()
    assert vipo("evaluate", *overrides, "--results", disk)[0] == 0


@pytest.fixture
def arguments(overrides: list[str]) -> list[str]:
    """The base and one trained run, evaluated with a reward that fills the disk where it is told to."""
    arms = [f"~experiment.arms.{arm}" for arm in ("vipo", "product", "inverted")] + ["experiment.arms.grpo.seeds=[0]"]
    return [*overrides, *arms, "evaluation.rewards=[redness,'bad_rewards:FillsDisk']"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs a finished experiment puts its own, for all others."""
    return tmp_path_factory.mktemp("finished") / "results"


@pytest.fixture
def results(
    finished: Path, vipo: Callable[..., tuple[int, str]], prepared: Path, arguments: list[str], tmp_path: Path
) -> Path:
    """A copy of the finished experiment, to the crate."""
    if not finished.exists():
        shutil.copytree(prepared, finished)
        for stage, *more in (["train"], ["evaluate"], ["evaluate", "arm=base"], ["report"], ["crate"]):
            code, shown = vipo(stage, *arguments, *more, "--results", finished)
            assert code == 0, shown
    return Path(shutil.copytree(finished, tmp_path / "results"))


def test_full_disk_where_results_are_shown_and_handed_over(
    mount: Mount, vipo: Callable[..., tuple[int, str]], results: Path, arguments: list[str]
) -> None:
    """Summary, page, crate, archive and hand-over: refused by name, and what was there is there, byte by byte."""
    disk = mount("16m")
    shutil.copytree(results / "demo", disk / "demo")
    signature = disk / "demo/ro-crate-metadata.json.sig"
    signature.write_text("an earlier crate's")
    before = _files(disk)
    export = ("export", disk / "demo/runs/grpo-s0", "--license", "mit")
    commands = {
        "report/data": ("summarize", *arguments, "--results", disk),
        "report": ("report", *arguments, "--results", disk),
        "crate": ("crate", *arguments, "--results", disk, "--zip"),
        "export/grpo-s0": export,
    }
    # Full at once, and full in the middle of what is written.
    for (target, command), pages in itertools.product(commands.items(), (0, 4)):
        (disk / "filler").unlink(missing_ok=True)
        _fill(disk, pages)
        _refused(vipo(*command), target if pages else str(disk), "No space left on device", "free disk space")
        left = _files(disk)
        del left["filler"]
        left = {name: content for name, content in left.items() if not Path(name).name.startswith(".lock")}
        assert left == {name: content for name, content in before.items() if not Path(name).name.startswith(".lock")}
    (disk / "filler").unlink()
    for command in commands.values():
        code, shown = vipo(*command)
        assert code == 0, shown
    assert not signature.exists()
    assert (disk / "demo.crate.zip").is_file()


def test_read_only_results(
    mount: Mount,
    vipo: Callable[..., tuple[int, str]],
    results: Path,
    arguments: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = _files(results)
    readonly = mount(results)
    # A finished run needs no writing to say so.
    with caplog.at_level(logging.INFO, logger="vipo"):
        code, shown = vipo("train", *arguments, "--results", readonly)
    assert (code, "is finished, nothing is left to do" in caplog.text) == (0, True), shown
    for stage in ("prepare", "encode", "evaluate", "summarize", "report", "crate"):
        _refused(vipo(stage, *arguments, "--results", readonly), str(readonly), "Read-only file system")
    _refused(vipo("train", *arguments, "experiment.name=other", "--results", readonly), "Read-only", str(readonly))
    # Before hours of training, not after them.
    _refused(vipo("base", "experiment=demo", "--output", readonly / "base"), "base", "Read-only", "choose another")
    run = readonly / "demo/runs/grpo-s0"
    _refused(vipo("export", run, "--license", "mit"), "export/grpo-s0", "Read-only", "choose another folder")
    # What only reads them works.
    for command in (("audit", readonly / "demo"), ("diff", readonly / "demo/runs/base-s0", run)):
        code, shown = vipo(*command)
        assert code == 0, shown
    assert vipo("export", run, "--license", "mit", "--output", tmp_path / "exported")[0] == 0
    assert _files(results) == before


@contextlib.contextmanager
def _as_user(user: int, group: int, umask: int) -> Iterator[None]:
    """The block as another user would run it."""
    groups, mask = os.getgroups(), os.umask(umask)
    os.setgroups([group])
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        os.umask(mask)


ADA, BOB, GROUP = 61001, 61002, 61100


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users reach, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_two_users_share_results(umask: int, shared: Path) -> None:
    """With umask 002 in a folder of their group they do; with 022 the second is told whose file is in the way."""
    folder = shared / "results"
    folder.mkdir()
    os.chown(folder, ADA, GROUP)
    folder.chmod(0o2775)
    with _as_user(ADA, GROUP, umask):
        (folder / "prompts").mkdir()
        with run_lock(folder / "prompts"), atomic_file(folder / "prompts" / "manifest.json") as path:
            path.write_text("Ada's")
        (folder / "prompts" / ".manifest.json.partial").write_text("cut off")
        with atomic_file(folder / "maps.safetensors") as path:
            save_file({"map": torch.zeros(1)}, path)
        with atomic_folder(folder / "weights") as weights:
            save_file({"weight": torch.zeros(1)}, weights / "model.safetensors")
    with _as_user(BOB, GROUP, umask):
        assert load_file(folder / "maps.safetensors").keys() == {"map"}
        assert load_file(folder / "weights" / "model.safetensors").keys() == {"weight"}
    if umask == 0o002:
        with _as_user(BOB, GROUP, umask):
            with run_lock(folder / "prompts"), atomic_file(folder / "prompts" / "manifest.json") as path:
                path.write_text("Bob's")
            aside = set_aside(folder, [folder / "prompts"])
        with _as_user(ADA, GROUP, umask):
            assert (aside / "prompts/manifest.json").read_text() == "Bob's"
            set_aside(folder, [aside])
        return
    with _as_user(BOB, GROUP, umask), pytest.raises(StorageError) as told, run_lock(folder / "prompts"):
        pytest.fail("locked")
    assert str(told.value).startswith(f"{folder}/prompts of user {ADA}: cannot be locked")
    assert "Permission denied" in str(told.value)
    (folder / "prompts").chmod(0o2775)
    with _as_user(BOB, GROUP, umask), pytest.raises(StorageError) as told, run_lock(folder / "prompts"):
        pytest.fail("locked")
    assert str(told.value).startswith(f"{folder}/prompts/.lock: user {ADA} made it and you may not write it")
    # To read them needs no right to write.
    with _as_user(BOB, GROUP, umask):
        assert (folder / "prompts/manifest.json").read_text() == "Ada's"
