"""Lineage is recorded once, from what is there; a lock is free the moment its holder dies."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waits import SECONDS

import vipo
from vipo.config.values import config_hash
from vipo.provenance import (
    ProvenanceError,
    RunLocked,
    StorageError,
    git_state,
    hashed,
    is_made,
    package_sha256,
    read_provenance,
    record_stage,
    run_lock,
    verify_outputs,
)
from vipo.provenance import environment as environment_module
from vipo.provenance.environment import code_state, installed_sha256


def _git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, the running package is one in `folder`."""
    (folder / "vipo" / "provenance").mkdir(parents=True)
    (folder / "vipo" / "__init__.py").write_text("")
    monkeypatch.setattr(environment_module, "__file__", str(folder / "vipo" / "provenance" / "environment.py"))


def _committed(folder: Path) -> str:
    _git(folder, "init", "--quiet")
    _git(folder, "add", ".")
    _git(folder, "commit", "--quiet", "-m", "first")
    return _git(folder, "rev-parse", "HEAD")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the running package, a result that is tracked, an input file and a generator folder."""
    root = tmp_path / "repository"
    _package(root, monkeypatch)
    (root / "results").mkdir(parents=True)
    (root / "code.py").write_text("x = 1\n" + "pass\n" * 20 + "".join(f"{letter}\n" for letter in "abcabba"))
    (root / "dvc.lock").write_text("stages: {}\n")
    (root / "results" / "tracked.txt").write_text("1\n")
    (root / "requirements.lock").write_text("torch==2.15.0\n")
    (root / "prompts.txt").write_text("a cat\n")
    (root / "generator" / "vae").mkdir(parents=True)
    (root / "generator" / "model_index.json").write_text("{}")
    (root / "generator" / "vae" / "weights.safetensors").write_bytes(b"\1\2\3")
    _committed(root)
    return root


@contextmanager
def _stage(root: Path, stage: str = "train") -> Iterator[Path]:
    folder = root / "results" / "demo" / "runs" / "vipo-s0"
    inputs = [root / "prompts.txt", root / "generator"]
    outputs = [folder / "metrics.jsonl", folder / "weights"]
    with record_stage(stage, folder, inputs=inputs, outputs=outputs, config={"b": 2, "a": 1}, seeds=[3], root=root):
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        (folder / "weights" / "a.safetensors").write_bytes(b"weights")
        (folder / "metrics.jsonl").write_text("{}\n")
        yield folder


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_record_names_everything(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/vipo", "train", "seed=3"])
    monkeypatch.setenv("VIPO_IMAGE_DIGEST", "sha256:abc")
    with _stage(root) as folder:
        assert not (folder / "provenance.json").exists()
    record = read_provenance(folder / "provenance.json")
    assert record["stage"] == "train"
    assert record["command"] == ["vipo", "train", "seed=3"]
    assert record["config"] == {"a": 1, "b": 2}
    assert record["config_sha256"] == config_hash({"a": 1, "b": 2})
    assert record["seeds"] == [3]
    assert record["inputs"][0] == {"path": "prompts.txt", "bytes": 6, "sha256": _sha(b"a cat\n")}
    listing = f"{_sha(b'{}')}  model_index.json\n{_sha(bytes([1, 2, 3]))}  vae/weights.safetensors\n"
    generator = record["inputs"][1]
    assert (generator["path"], generator["bytes"], generator["sha256"]) == ("generator", 5, _sha(listing.encode()))
    assert record["outputs"][0]["path"] == "results/demo/runs/vipo-s0/metrics.jsonl"
    assert record["outputs"][1]["files"] == {"a.safetensors": {"bytes": 7, "sha256": _sha(b"weights")}}
    assert record["git"] == {
        "commit": _git(root, "rev-parse", "HEAD"), "dirty": False, "untracked": {}, "diff_sha256": None
    }  # fmt: skip
    assert "checkout" not in record
    assert not (folder / "provenance.diff").exists()
    assert record["package_sha256"] == package_sha256()
    assert record["lock_sha256"] == _sha(b"torch==2.15.0\n")
    assert record["container_digest"] == "sha256:abc"
    assert record["hardware"]["cpu"]
    assert record["hardware"]["cores"] == os.cpu_count()
    assert record["hardware"]["memory_bytes"] > 2**28
    assert record["versions"]["vipo"] == vipo.__version__
    assert record["versions"]["python"] == ".".join(str(part) for part in sys.version_info[:3])
    numbers = {"torch", "diffusers", "transformers", "accelerate", "timm", "peft", "numpy", "scipy"}
    assert set(record["versions"]) >= numbers | {"pandas", "pyarrow", "matplotlib", "pillow"}
    assert record["versions"]["pillow"] == importlib.metadata.version("pillow")
    assert record["started"] <= record["ended"]
    assert record["ended"].endswith("+00:00")
    assert str(root) not in (folder / "provenance.json").read_text()


def test_outputs_can_be_listed_afterwards(root: Path) -> None:
    folder = root / "results" / "prompts"
    with record_stage(
        "prepare", folder, inputs=[], outputs=lambda: sorted(folder.glob("*.jsonl")), config=None, root=root
    ):
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("1\n")
        (folder / "eval.jsonl").write_text("2\n")
    record = read_provenance(folder / "provenance.json")
    assert [Path(entry["path"]).name for entry in record["outputs"]] == ["eval.jsonl", "train.jsonl"]
    assert record["config_sha256"] is None
    assert record["container_digest"] is None


def test_what_another_process_scored_is_other_work(root: Path) -> None:
    folder = root / "results" / "demo" / "evaluation" / "vipo-s0"
    inputs = hashed("score", [root / "prompts.txt"], root)

    def score(version: str) -> None:
        processes = {"r": {"packages": {"x": version}}}
        with record_stage(
            "score",
            folder,
            inputs=inputs,
            outputs=[folder / "scores.parquet"],
            config={"a": 1},
            root=root,
            experiment=root / "results" / "demo",
            processes=processes,
        ):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "scores.parquet").write_text(version)

    score("1")
    made = partial(is_made, "score", folder, inputs, {"a": 1}, root)
    assert read_provenance(folder / "provenance.json")["reward_processes"] == {"r": {"packages": {"x": "1"}}}
    assert made({"r": {"packages": {"x": "1"}}})
    assert not made({"r": {"packages": {"x": "2"}}})
    assert not made()
    score("2")
    (aside,) = (root / "results/demo/.superseded").glob("*/evaluation/vipo-s0/scores.parquet")
    assert (aside.read_text(), (folder / "scores.parquet").read_text()) == ("1", "2")


def test_the_same_bytes_in_another_place_are_the_same_work(root: Path, tmp_path: Path) -> None:
    """As the hub's cache of another user has them."""
    folder, experiment = root / "results/demo/evaluation/vipo-s0", root / "results/demo"
    caches = [tmp_path / user / "hub/snapshots/1" for user in ("ann", "ben", "eve")]
    for cache, content in zip(caches, ("weights", "weights", "others"), strict=True):
        cache.mkdir(parents=True)
        (cache / "model.safetensors").write_text(content)
        (cache / "config.json").write_text("{}")

    def read(cache: Path) -> list[dict[str, Any]]:
        files = [cache / "config.json", cache / "model.safetensors"]
        return hashed("score", [root / "prompts.txt", root / "generator", *files], root)

    def score(cache: Path) -> None:
        with record_stage(
            "score",
            folder,
            inputs=read(cache),
            outputs=[folder / "scores.parquet"],
            config={"a": 1},
            root=root,
            experiment=experiment,
        ):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "scores.parquet").write_text("1")

    score(caches[0])
    made = [is_made("score", folder, read(cache), {"a": 1}, root) for cache in caches]
    assert made == [True, True, False]
    # Two files that changed places are other inputs.
    swapped = read(caches[0])
    swapped[2:] = swapped[:1:-1]
    assert not is_made("score", folder, swapped, {"a": 1}, root)
    score(caches[1])
    assert not (experiment / ".superseded").exists()
    score(caches[2])
    assert (experiment / ".superseded").is_dir()


def test_a_record_outlives_a_failure_where_its_outputs_do(root: Path) -> None:
    with _stage(root) as folder:
        pass
    record = (folder / "provenance.json").read_bytes()
    with pytest.raises(RuntimeError, match="stopped"), _stage(root):
        raise RuntimeError("stopped")
    assert (folder / "provenance.json").read_bytes() == record

    def stopped_while_writing() -> None:
        with _stage(root):
            (folder / "metrics.jsonl").write_text("{}\n{}\n")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stopped_while_writing()
    assert not list(folder.glob("*provenance*"))


def test_missing_files_are_named(root: Path) -> None:
    folder = root / "results" / "x"
    with (
        pytest.raises(ProvenanceError, match=r"nothing\.txt: input of stage 'encode' does not exist"),
        record_stage("encode", folder, inputs=[root / "nothing.txt"], outputs=[], config=None, root=root),
    ):
        pytest.fail("the stage must not start")
    with (
        pytest.raises(ProvenanceError, match=r"out\.txt: output of stage 'encode' does not exist"),
        record_stage("encode", folder, inputs=[], outputs=[folder / "out.txt"], config=None, root=root),
    ):
        pass
    assert not (folder / "provenance.json").exists()


def test_a_folder_belongs_to_one_stage(root: Path) -> None:
    with _stage(root) as folder:
        pass
    with (
        pytest.raises(ProvenanceError, match="belongs to stage 'train'; give stage 'evaluate' a folder of its own"),
        _stage(root, "evaluate"),
    ):
        pytest.fail("the stage must not start")
    assert read_provenance(folder / "provenance.json")["stage"] == "train"


def test_every_change_of_an_output_is_named(root: Path) -> None:
    with _stage(root) as folder:
        pass
    provenance, place = folder / "provenance.json", "results/demo/runs/vipo-s0"
    assert verify_outputs(provenance, root) == []
    (folder / "weights" / ".snakemake_timestamp").touch()
    assert verify_outputs(provenance, root) == []
    (folder / "weights" / "a.safetensors").write_bytes(b"Weights")
    (folder / "weights" / "b.safetensors").write_bytes(b"")
    (folder / "metrics.jsonl").unlink()
    missing, changed, added = verify_outputs(provenance, root)
    assert missing == f"{place}/metrics.jsonl: missing"
    assert changed.startswith(f"{place}/weights/a.safetensors: changed")
    assert added == f"{place}/weights/b.safetensors: added"
    shutil.rmtree(folder / "weights")
    assert verify_outputs(provenance, root)[1] == f"{place}/weights/a.safetensors: missing"


def test_outputs_verify_in_a_repository_that_moved(root: Path) -> None:
    with _stage(root) as folder:
        pass
    moved = root.rename(root.with_name("elsewhere"))
    assert verify_outputs(moved / folder.relative_to(root) / "provenance.json", moved) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"stage": "train"}',
        '{"stage": 3, "inputs": [], "outputs": []}',
        '{"stage": "train", "inputs": {"path": "a"}, "outputs": []}',
        '{"stage": "train", "inputs": [], "outputs": [{"path": null}]}',
        "\0",
    ],
)
def test_a_record_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "provenance.json"
    path.write_text(text)
    with pytest.raises(ProvenanceError, match=r"provenance\.json: .*run its stage again"):
        verify_outputs(path, tmp_path)


def test_dirty_means_tracked_files_outside_results(root: Path) -> None:
    clean = git_state(root)
    assert clean["dirty"] is False
    (root / "results" / "tracked.txt").write_text("2\n")
    (root / "dvc.lock").write_text("a\n")
    assert git_state(root) == clean
    (root / "untracked.py").write_text("y = 1\n")
    assert (git_state(root)["dirty"], git_state(root)["untracked"]) == (False, {"untracked.py": 6})
    (root / "untracked.py").unlink()
    # Text for which Myers' and the patience algorithm give different diffs.
    (root / "code.py").write_text("x = 1\n" + "pass\n" * 20 + "".join(f"{letter}\n" for letter in "cbabac"))
    dirty = git_state(root)
    assert dirty["dirty"] is True
    assert dirty["commit"] == clean["commit"]
    for option in ("color.ui", "diff.noprefix", "diff.mnemonicPrefix"):
        _git(root, "config", option, "true")
    _git(root, "config", "color.ui", "always")
    _git(root, "config", "diff.context", "9")
    _git(root, "config", "diff.algorithm", "patience")
    assert git_state(root) == dirty
    (root / "code.py").write_text("x = 3\n")
    assert git_state(root)["diff_sha256"] != dirty["diff_sha256"]
    _git(root, "add", "code.py")
    assert git_state(root)["dirty"] is True


def test_the_stored_diff_gives_the_code_back(root: Path, tmp_path: Path) -> None:
    (root / "code.py").write_text("x = 2\n")
    (root / "generator" / "vae" / "weights.safetensors").write_bytes(bytes(range(256)))
    (root / "results" / "tracked.txt").write_text("2\n")
    (root / ".gitignore").write_text("*.log\n")
    (root / "a.log").write_text("ignored\n")
    (root / "new *").mkdir()
    (root / "new *" / "reward [x].py").write_text("y = 1\n")
    (root / "data.bin").write_bytes(b"\0" * (2**20 + 1))
    index = (root / ".git" / "index").read_bytes()
    objects = sorted((root / ".git" / "objects").rglob("*"))
    with _stage(root) as folder:
        pass
    git = read_provenance(folder / "provenance.json")["git"]
    assert git["dirty"] is True
    assert git["untracked"] == {".gitignore": 6, "data.bin": 2**20 + 1, "new */reward [x].py": 6}
    diff = (folder / "provenance.diff").read_bytes()
    assert git["diff_sha256"] == _sha(diff)
    assert (root / ".git" / "index").read_bytes() == index
    assert sorted((root / ".git" / "objects").rglob("*")) == objects

    _git(tmp_path, "clone", "--quiet", str(root), "clone")
    clone = tmp_path / "clone"
    _git(clone, "checkout", "--quiet", git["commit"])
    _git(clone, "apply", str(folder / "provenance.diff"))
    for name in ("code.py", "generator/vae/weights.safetensors", ".gitignore", "new */reward [x].py"):
        assert (clone / name).read_bytes() == (root / name).read_bytes()
    assert (clone / "results" / "tracked.txt").read_text() == "1\n"
    assert not (clone / "data.bin").exists()

    _git(root, "add", ".")
    _git(root, "commit", "--quiet", "-m", "second")
    with _stage(root):
        pass
    assert not (folder / "provenance.diff").exists()


def test_git_hooks_do_not_mislead(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = git_state(root)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
    assert git_state(root) == expected


def test_no_repository_no_commit_no_git(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = {"commit": None, "dirty": None, "untracked": None, "diff_sha256": None}
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_state(plain) == unknown
    _git(plain, "init", "--quiet")
    assert git_state(plain) == unknown
    monkeypatch.setenv("PATH", "")
    assert git_state(root) == unknown
    # A checkout that git cannot read is no image, whatever its surroundings say.
    monkeypatch.setenv("VIPO_GIT_COMMIT", "0123")
    assert code_state() == (unknown, b"")


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an image that holds the running package."""
    image = tmp_path / "image"
    _package(image, monkeypatch)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("VIPO_GIT_COMMIT", "a" * 40)
    return image


_BUILT = {"commit": "a" * 40, "dirty": False, "untracked": {}, "diff_sha256": None}
_UNKNOWN = {"commit": None, "dirty": None, "untracked": None, "diff_sha256": None}


def _recorded(root: Path) -> dict[str, Any]:
    (root / "prompts.txt").touch()
    (root / "generator").mkdir(exist_ok=True)
    with _stage(root) as folder:
        pass
    return read_provenance(folder / "provenance.json")


def test_an_image_knows_the_commit_that_it_was_built_from(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _recorded(image)
    assert record["git"] == _BUILT
    assert "checkout" not in record
    monkeypatch.delenv("VIPO_GIT_COMMIT")
    assert _recorded(image)["git"] == _UNKNOWN


def test_the_code_of_an_image_is_told_from_the_checkout_that_it_is_run_on(root: Path, image: Path) -> None:
    (image / "requirements.lock").write_text("torch==1.0\n")
    record = _recorded(root)
    assert record["git"] == _BUILT
    assert record["checkout"] == git_state(root)
    assert record["checkout"]["commit"] == _git(root, "rev-parse", "HEAD")
    assert record["lock_sha256"] == _sha(b"torch==1.0\n")
    (root / "reward.py").write_text("x = 1\n")
    record, folder = _recorded(root), root / "results" / "demo" / "runs" / "vipo-s0"
    assert not (folder / "provenance.diff").exists()
    diff = (folder / "provenance.checkout.diff").read_bytes()
    assert b"+x = 1" in diff
    assert record["checkout"]["diff_sha256"] == _sha(diff)


def test_the_code_of_another_checkout_is_told_from_the_one_that_it_is_run_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    _package(other, monkeypatch)
    commit = _committed(other)
    (other / "vipo" / "__init__.py").write_text("x = 1\n")
    record, folder = _recorded(root), root / "results" / "demo" / "runs" / "vipo-s0"
    assert (record["git"]["commit"], record["git"]["dirty"]) == (commit, True)
    assert (record["checkout"]["commit"], record["checkout"]["dirty"]) == (_git(root, "rev-parse", "HEAD"), False)
    assert b"+x = 1" in (folder / "provenance.diff").read_bytes()
    assert not (folder / "provenance.checkout.diff").exists()
    # A clone in the same state: there is nothing to tell apart.
    _git(tmp_path, "clone", "--quiet", str(other), "clone")
    _git(other, "checkout", "--quiet", ".")
    (tmp_path / "clone" / ".git" / "info" / "exclude").write_text("prompts.txt\n")
    record = _recorded(tmp_path / "clone")
    assert record["git"]["commit"] == commit
    assert "checkout" not in record
    # A folder that no repository knows is of no commit, least of all the code's.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "plain").mkdir()
    record = _recorded(tmp_path / "plain")
    assert (record["git"]["commit"], record["checkout"]) == (commit, _UNKNOWN)


def test_a_repository_around_an_environment_does_not_hold_its_code(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / ".git" / "info" / "exclude").write_text(".venv\n")
    _package(root / ".venv" / "site-packages", monkeypatch)
    monkeypatch.setenv("VIPO_GIT_COMMIT", "a" * 40)
    record = _recorded(root)
    assert record["git"] == _UNKNOWN
    assert record["checkout"]["commit"] == _git(root, "rev-parse", "HEAD")
    assert record["lock_sha256"] is None


def test_the_environment_is_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(folder: str, name: str, version: str) -> None:
        place = tmp_path / folder / f"{name}.dist-info"
        place.mkdir(parents=True, exist_ok=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    install("first", "Some_Package", "1.0")
    install("second", "another.package", "2")
    install("second", "vipo", "3")
    # Hidden by the one before it.
    install("second", "some-package", "0.9")
    assert installed_sha256() == _sha(b"another-package==2\nsome-package==1.0\n")


def test_a_rank_records_what_its_launcher_was_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/vipo/cli.py", "train", "--config", "/tmp/x.yaml"])
    monkeypatch.setenv("VIPO_COMMAND", json.dumps(["vipo", "train", "seed=3"]))
    assert _recorded(root)["command"] == ["vipo", "train", "seed=3"]


def test_package_identity_follows_code_and_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vipo"
    (package / "provenance").mkdir(parents=True)
    (package / "reporting" / "templates").mkdir(parents=True)
    (package / "a.py").write_text("a")
    monkeypatch.setattr(environment_module, "__file__", str(package / "provenance" / "environment.py"))
    seen = [package_sha256()]
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert package_sha256() == seen[0]
    for path, text in (("a.py", "b"), ("reporting/b.py", ""), ("reporting/templates/page.html", "<p>")):
        (package / path).write_text(text)
        seen.append(package_sha256())
    (package / "a.py").rename(package / "c.py")
    seen.append(package_sha256())
    assert len(set(seen)) == len(seen)


def _nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def _gpus() -> tuple[Any, Any, Any]:
    found = environment_module.hardware()
    return found["gpus"], found["gpu_driver"], found["cuda"]


def test_gpus_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    _nvidia_smi(tmp_path, "echo '550.54, NVIDIA One'\necho '550.54, NVIDIA Two'", monkeypatch)
    assert _gpus() == (["NVIDIA One", "NVIDIA Two"], "550.54", None)
    _nvidia_smi(tmp_path, "exit 9", monkeypatch)
    assert _gpus() == (None, None, None)
    monkeypatch.setenv("PATH", "")
    assert _gpus() == (None, None, None)


def test_gpus_are_those_that_torch_can_use_where_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> str:
        raise RuntimeError("the driver is too old")

    cuda = SimpleNamespace(device_count=lambda: 1, get_device_name=lambda index: f"NVIDIA {index}")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8")))
    monkeypatch.setenv("PATH", "")
    assert _gpus() == (["NVIDIA 0"], None, "12.8")
    cuda.device_count = lambda: 0
    assert _gpus() == ([], None, "12.8")
    cuda.device_count, cuda.get_device_name = lambda: 1, refuse
    assert _gpus() == (None, None, "12.8")


_HOLD = """
import sys, time
from pathlib import Path
from vipo.provenance import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@contextmanager
def _holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_stops_and_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "vipo-s0"
    with _holder(folder) as process:
        message = rf"vipo-s0: another process writes it \(process {process.pid} on .* since 20"
        with pytest.raises(RunLocked, match=message), run_lock(folder):
            pytest.fail("two writers")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run_lock(folder):
            assert json.loads((folder / ".lock-holder.json").read_text())["pid"] == os.getpid()


def test_waiting_gets_the_lock_when_the_holder_ends(tmp_path: Path) -> None:
    asked = threading.Event()
    with _holder(tmp_path) as process:

        def end() -> None:
            asked.set()
            process.terminate()

        threading.Timer(0.5, end).start()
        with run_lock(tmp_path, wait_seconds=SECONDS):
            assert asked.is_set()
            assert process.wait(SECONDS) == -signal.SIGTERM


def test_lock_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), run_lock(tmp_path):
        raise ValueError("x")
    with run_lock(tmp_path):
        with pytest.raises(RunLocked, match=str(os.getpid())), run_lock(tmp_path):
            pytest.fail("two writers")
        with pytest.raises(RunLocked), run_lock(tmp_path):
            pytest.fail("two writers")
    with run_lock(tmp_path), run_lock(tmp_path / "another"):
        pass


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file: cannot be locked"), run_lock(tmp_path / "file"):
        pytest.fail("no folder")
