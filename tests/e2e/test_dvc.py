"""DVC on the demo at a small budget: one experiment, run by Snakemake here and by DVC in clones of it."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pandas as pd
import pytest
import yaml
from nursery import Nurseries, nurseries

from vipo.config.compose import repository_root
from vipo.provenance import git_state

ROOT = repository_root()

CHECKOUT = (
    "configs", "workflow", "data", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore", ".gitignore",
    "dvc.yaml", "Makefile", "Snakefile", "local", "requirements.lock", "pyproject.toml", "CITATION.cff",
)  # fmt: skip
EXPERIMENT = "configs/experiment/demo.yaml"
SMALL: dict[str, dict[str, Any]] = {
    "sampling": {"steps": 4},
    "training": {"updates": 2, "group_size": 4, "micro_batch": 4, "trained_transitions": 2, "save_at": [1, 6]},
    "evaluation": {"prompts": 4, "samples_per_prompt": 1, "steps": 2, "bootstrap": 100},
}
METER = {
    **{"arms": ["vipo"], "updates": 1, "reference": 0, "stepped": 1, "directions": ["sgd"]},
    **{"held_out": 1, "held_out_samples": 1},
}
VOLATILE = (
    *("provenance.json", "timing.jsonl", "tb", "sheets", "trackers", "checkpoints"),
    *("index.html", "ro-crate-metadata.json", "logs"),
)


@pytest.fixture(scope="module", autouse=True)
def programs(forks: Nurseries) -> Iterator[None]:
    """Snakemake, DVC and the stages are forks, but where a test asks for real ones."""
    with pytest.MonkeyPatch.context() as patch:
        tools = [str(forks.need("vipo", "snakemake", "dvc")), str(Path(sys.executable).parent), os.environ["PATH"]]
        patch.setenv("PATH", os.pathsep.join(tools))
        yield


def _run(project: Path, *command: str | Path, code: int = 0) -> str:
    """Standard output and error of a command that ends with `code`, in a project with this environment's tools."""
    name = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | name | {"OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    environment["DVC_SITE_CACHE_DIR"] = str(project.parent / "dvc-site")
    result = subprocess.run(
        list(map(str, command)),
        cwd=project,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == code, result.stdout
    return result.stdout


def _json(project: Path, *command: str) -> Any:
    # Progress and hints come before and after.
    text = _run(project, *command)
    return json.JSONDecoder().raw_decode(text[text.index("{") :])[0]


def _make(project: Path, target: str, code: int = 0) -> str:
    # The environment is this one; make would build the project its own.
    return _run(project, "make", "-o", ".venv/.complete", target, code=code)


def _outputs(project: Path) -> list[str]:
    """The files that dvc.lock names, those of folders one by one."""
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    paths = [project / out["path"] for stage in lock["stages"].values() for out in stage["outs"]]
    found = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    names = sorted(str(file.relative_to(project)) for file in found)
    return [name for name in names if not name.endswith(".snakemake_timestamp")]


def _clean(project: Path) -> bool:
    return _run(project, "dvc", "status").strip().endswith("Data and pipelines are up to date.")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the repository holds beside the package, under git."""
    project = tmp_path_factory.mktemp("dvc") / "project"
    for name in CHECKOUT:
        source, target = ROOT / name, project / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target, follow_symlinks=False)
    for command in (("init", "--quiet"), ("config", "user.name", "t"), ("config", "user.email", "t@example.org")):
        _run(project, "git", *command)
    _run(project, "git", "add", ".")
    _run(project, "git", "commit", "--quiet", "-m", "checkout")
    return project


@pytest.fixture(scope="module")
def written(checkout: Path) -> str:
    """dvc.yaml as the tool writes it for the repository as it is, with the record that a rebuilt generator has.

    And with a configuration of an earlier start, which is not read, and which the tool's dry run leaves alone.
    """
    record, earlier = checkout / "data/demo-generator/provenance.json", checkout / "results/demo/configs/base-s0.yaml"
    earlier.parent.mkdir(parents=True)
    for file in (record, earlier):
        file.write_text("{}")
    _run(checkout, "python", "workflow/dvc_yaml.py")
    assert earlier.read_text() == "{}"
    for file in (record, earlier):
        file.unlink()
    return (checkout / "dvc.yaml").read_text()


@pytest.fixture(scope="module")
def project(checkout: Path, written: str) -> Path:
    """The demo with two arms and a small budget, run by Snakemake, committed to DVC and git."""
    path = checkout / EXPERIMENT
    settings = yaml.safe_load(path.read_text())
    settings["experiment"]["arms"] = {"base": {"seeds": [0]}, "vipo": {"seeds": [0]}}
    for section, values in SMALL.items():
        settings[section] |= values
    # A measurement of credit, a protocol, a reward of another process; shares are one stage for DVC.
    settings["experiment"]["meter"] = METER
    settings["cluster"] = {"shares": 2}
    settings["protocol"] = {"name": "tiny", "version": 1, "pins": {"evaluation": {"prompts": 4}}}
    served = {"reward": "redness", "environment": sys.executable}
    rewards = ["object_redness", "scene_shape", {"name": "process", "label": "served", "options": served}]
    settings["evaluation"]["rewards"] = rewards
    path.write_text("# @package _global_\n" + yaml.safe_dump(settings, sort_keys=False))
    _run(checkout, "python", "workflow/dvc_yaml.py")
    _run(checkout, "git", "commit", "--quiet", "--all", "-m", "a small budget")
    _run(checkout, "snakemake", "--profile", "local")
    _make(checkout, "dvc-commit")
    _run(checkout, "git", "add", "dvc.lock")
    _run(checkout, "git", "commit", "--quiet", "-m", "results")
    return checkout


def _clone(project: Path, name: str) -> Path:
    clone = project.parent / name
    _run(project.parent, "git", "clone", "--quiet", project, clone)
    return clone


def test_dvc_yaml_is_current(written: str) -> None:
    assert (ROOT / "dvc.yaml").read_text() == written, "run 'make dvc-yaml'"
    stages = yaml.safe_load(written)["stages"]
    parameters = {file for stage in stages.values() for entry in stage["params"] for file in entry}
    tracked = subprocess.run(["git", "ls-files", "configs"], cwd=ROOT, text=True, capture_output=True).stdout.split()
    assert EXPERIMENT in parameters
    assert all((ROOT / file).is_file() for file in parameters)
    assert not tracked or parameters <= set(tracked)
    # An arm's own overrides decide its weights and its scores.
    for name, stage in stages.items():
        rule, _, run = name.partition("-")
        keys = [key for entry in stage["params"] for key in entry.get(EXPERIMENT) or ()]
        if rule in ("train", "sample", "score"):
            assert f"experiment.arms.{run.rpartition('-')[0]}" in keys, name
        # What is trained on is scored as well, of the base too.
        rewards = [file for entry in stage["params"] for file in entry if file.startswith("configs/reward/")]
        assert bool(rewards) is (rule in ("train", "credit", "score", "compare", "summarize")), name
    # What Snakemake derives from them is no dependency.
    dependencies = {file for stage in stages.values() for file in stage["deps"]}
    assert not any("/configs/" in file for file in dependencies)
    assert {"data/prompts/colourless.jsonl", "data/demo-generator/model_index.json"} <= dependencies
    outputs = {str(out) for stage in stages.values() for out in stage["outs"]}
    assert not any(name in out for out in outputs for name in VOLATILE)


def test_every_section_can_be_changed_in_the_experiments_file() -> None:
    """A section that the file does not name is none of DVC's parameters there."""
    settings = yaml.safe_load((ROOT / EXPERIMENT).read_text())
    assert settings.keys() >= {"perception", "sampling", "objective", "optimizer", "training", "evaluation"}
    # These are chosen by file (`reward=redness`), which a section here would undo.
    assert not settings.keys() & {"generator", "prompts", "reward"}


def test_after_snakemake_dvc_has_nothing_to_do(project: Path) -> None:
    assert _clean(project)
    assert "Running stage" not in _run(project, "dvc", "repro")
    assert _run(project, "git", "status", "--porcelain") == ""
    files = _outputs(project)
    assert any(name.endswith("weights/transformer/diffusion_pytorch_model.safetensors") for name in files)
    assert any("/updates/000001/" in name for name in files)
    assert "results/demo/credit/base/credit.json" in files
    scores = pd.read_parquet(project / "results/demo/evaluation/vipo-s0/scores.parquet")
    assert scores["reward/served"].notna().all()
    totals = pd.read_csv(project / "results/demo/comparison/metrics.csv")
    assert "reward/served" in set(totals["column"])
    assert totals["protocol"].str.startswith("tiny v1 (").all()
    assert not [name for name in files if any(part in name for part in VOLATILE)]


def test_a_dry_run_without_results_ends_at_the_second_stage(project: Path) -> None:
    """As docs/reproducibility.md says: DVC looks for files that its dry run has not made."""
    clone = _clone(project, "dry")
    # Before the first lock.
    _run(clone, "git", "checkout", "--quiet", "HEAD~1")
    shown = _run(clone, "dvc", "repro", "--dry", code=255)
    assert "Running stage 'prepare'" in shown
    assert "results/demo/prompts/eval.jsonl" in shown


def test_dvc_lock_alone_makes_no_run_dirty(project: Path) -> None:
    lock = project / "dvc.lock"
    text = lock.read_text()
    lock.write_text(text + "# another result\n")
    try:
        assert git_state(project)["dirty"] is False
    finally:
        lock.write_text(text)


def test_same_result_twice(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh clone, run by DVC where the first was run by Snakemake: the same bytes, hence the same lock.

    The stages are forks of another process than the first ones were, hence with another hash seed.
    """
    clone = _clone(project, "twice")
    with nurseries() as others:
        monkeypatch.setenv("PATH", f"{others.need('vipo')}{os.pathsep}{os.environ['PATH']}")
        shown = _run(clone, "dvc", "repro")
    assert "Running stage 'train-vipo-s0'" in shown
    assert _run(clone, "git", "status", "--porcelain") == ""
    files = _outputs(project)
    assert _outputs(clone) == files
    for name in files:
        assert (clone / name).read_bytes() == (project / name).read_bytes(), name
    record = json.loads((clone / "results/demo/runs/vipo-s0/provenance.json").read_text())
    assert record["checkout"]["dirty"] is False


def test_experiments_edit_the_tracked_file(project: Path) -> None:
    clone = _clone(project, "changed")
    # The first clone's cache, without a second copy.
    _run(clone, "dvc", "cache", "dir", "--local", project / ".dvc/cache")
    _run(clone, "dvc", "checkout", "--quiet")
    assert _clean(clone)
    run = clone / "results/demo/runs/vipo-s0"
    first = {name: (run / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    shown = _run(clone, "dvc", "exp", "run", "--name", "slow", "-S", f"{EXPERIMENT}:optimizer.learning_rate=1e-5")
    assert "Running stage 'train-vipo-s0'" in shown
    assert "Running stage 'prepare'" not in shown
    assert "Running stage 'score-base-s0'" not in shown
    # DVC deletes none of what was finished, in its cache or not: the stages set it aside whole.
    kept = clone / "results/demo/.superseded"
    assert {name: next(kept.glob(f"*/runs/vipo-s0/{name}")).read_bytes() for name in first} == first
    assert next(kept.glob("*/runs/vipo-s0/weights"))
    assert next(kept.glob("*/evaluation/vipo-s0/scores.parquet"))
    changed = (clone / EXPERIMENT).read_text()
    assert changed.startswith("# @package _global_\n")
    config = yaml.safe_load(_run(clone, "vipo", "config", "experiment=demo", "arm=vipo"))
    assert float(config["optimizer"]["learning_rate"]) == 1e-5

    difference = _json(clone, "dvc", "params", "diff", "--json")
    assert list(difference) == [EXPERIMENT]
    assert list(difference[EXPERIMENT]) == ["optimizer.learning_rate"]
    rate = difference[EXPERIMENT]["optimizer.learning_rate"]
    assert (rate["old"], rate["new"]) == (3e-4, 1e-5)
    summary = "results/demo/evaluation/vipo-s0/summary.json"
    shown = _json(clone, "dvc", "metrics", "show", "--json")[""]["data"]
    assert shown[summary]["data"] == json.loads((clone / summary).read_text())
    before = json.loads((project / summary).read_text())["change/total"]
    after = json.loads((clone / summary).read_text())["change/total"]
    assert 0 < after < before
    change = _json(clone, "dvc", "metrics", "diff", "--json")[summary]["change/total"]
    assert (change["old"], change["new"]) == (before, after)
    for command in (["show"], ["diff", "HEAD"]):
        drawn = _json(clone, "dvc", "plots", *command, "--json", "--out", "plots")
        assert "errors" not in drawn
        curve = json.dumps(drawn["data"]["held-out object redness"])
        assert "reward/object_redness" in curve
        assert any(name.endswith(".svg") for name in drawn["data"])
    shutil.rmtree(clone / "plots")

    table = _run(clone, "dvc", "exp", "show", "--csv")
    assert "slow" in table
    _run(clone, "git", "checkout", "--quiet", ".")
    _run(clone, "dvc", "checkout", "--quiet")
    assert (clone / summary).read_bytes() == (project / summary).read_bytes()
    _run(clone, "dvc", "exp", "apply", "slow")
    assert json.loads((clone / summary).read_text())["change/total"] == after
    assert (clone / EXPERIMENT).read_text() == changed
    assert _clean(clone)


def test_an_arms_override_of_the_evaluation_makes_it_again(project: Path) -> None:
    clone = _clone(project, "overridden")
    _run(clone, "dvc", "cache", "dir", "--local", project / ".dvc/cache")
    _run(clone, "dvc", "checkout", "--quiet")
    path = clone / EXPERIMENT
    settings = yaml.safe_load(path.read_text())
    settings["experiment"]["arms"]["base"]["overrides"] = ["evaluation.steps=5"]
    path.write_text("# @package _global_\n" + yaml.safe_dump(settings, sort_keys=False))
    assert _json(clone, "dvc", "status", "--json").keys() == {"sample-base-s0", "score-base-s0", "compare", "summarize"}


@contextlib.contextmanager
def _ssh_server(folder: Path) -> Iterator[tuple[int, Path]]:
    """An SSH server with SFTP on this machine; gives its port and the key that it lets in."""
    key, path = asyncssh.generate_private_key("ssh-ed25519"), folder / "key"
    key.write_private_key(str(path))
    path.chmod(0o600)
    key.write_public_key(f"{path}.pub")
    host = asyncssh.generate_private_key("ssh-ed25519")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[host], authorized_client_keys=f"{path}.pub", sftp_factory=True
        )

    server = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    try:
        yield server.get_port(), path
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_clone_and_pull_over_ssh(project: Path, tmp_path: Path) -> None:
    clone = _clone(project, "far")
    with _ssh_server(tmp_path) as (port, key):
        for place in (project, clone):
            _run(
                place, "dvc", "remote", "add", "--quiet", "--local", "far", f"ssh://me@127.0.0.1:{port}{tmp_path}/store"
            )
            _run(place, "dvc", "remote", "modify", "--local", "far", "keyfile", key)
        _run(project, "dvc", "push", "--remote", "far")
        _run(clone, "dvc", "pull", "--remote", "far")
    assert _clean(clone)
    assert _outputs(clone) == _outputs(project)
    assert _run(project, "git", "status", "--porcelain") == ""


def test_after_a_pull_one_command_makes_snakemake_see_the_results(project: Path) -> None:
    clone, store = _clone(project, "near"), project.parent / "store"
    for place in (project, clone):
        _run(place, "dvc", "remote", "add", "--quiet", "--local", "--default", "near", store)
    refused = _make(clone, "dvc-import", code=2)
    assert "error: results/ is not what dvc.lock says" in refused
    _run(project, "dvc", "push")
    _run(clone, "dvc", "pull")
    scores = clone / "results/demo/evaluation/vipo-s0/scores.parquet"
    content = scores.read_bytes()
    scores.write_bytes(content[:-1])
    refused = _make(clone, "dvc-import", code=2)
    assert "modified" in refused
    assert "error: results/ is not what dvc.lock says" in refused
    assert not (clone / "results/demo/report/index.html").exists()
    scores.write_bytes(content)

    shown = _make(clone, "dvc-import")
    assert re.search(r"^\[1/2\] report: ", shown, re.MULTILINE)
    assert "2 jobs done in " in shown
    assert not (clone / "results/demo/runs/vipo-s0/provenance.json").exists()
    page = (clone / "results/demo/report/index.html").read_text()
    assert "Not recorded here: vipo-s0." in page
    compared = _run(clone, "vipo", "diff", "results/demo/runs/base-s0", "results/demo/runs/vipo-s0")
    assert "## Code: not recorded here" in compared
    assert "## Evaluation: held-out scores" in compared
    refused = _run(clone, "vipo", "export", "results/demo/runs/vipo-s0", code=1)
    assert "results/demo/runs/vipo-s0/provenance.json" in refused
    assert "not here, as after a pull" in refused
    assert (clone / "results/demo/ro-crate-metadata.json").is_file()
    # The audit, which reads dvc.lock without DVC, takes it for an anchor that holds.
    told = _json(clone, "vipo", "audit", "results/demo", "--json")
    assert [anchor["kind"] for anchor in told["anchors"]] == ["dvc.lock"]
    # The code that ran is a checkout of its own here, and its commit is not in the clone.
    kinds = {(finding["severity"], finding["check"]) for finding in told["findings"]}
    assert kinds == {("remark", "lineage"), ("remark", "code")}
    assert "Nothing to be done" in _run(clone, "snakemake", "--profile", "local", "--dry-run")
    assert _clean(clone)
    # It knows what the results were made with: another learning rate is another run.
    override = 'overrides=["optimizer.learning_rate=1e-5"]'
    planned = _run(clone, "snakemake", "--profile", "local", "--dry-run", "--quiet", "rules", "--config", override)
    jobs = {line.split()[0] for line in planned.splitlines() if line.endswith(" 1") and not line.startswith("total")}
    assert jobs == {"train", "credit", "sample", "score", "compare", "summarize", "report", "crate", "all"}
