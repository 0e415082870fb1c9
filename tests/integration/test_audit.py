"""What the audit says: verdicts, numbers computed again, code and lineage, one stage again, pulled results."""

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import yaml
from audit_fixture import EXPERIMENT, audited, git, inside, md5, recompute_hashes

from vipo.audit import Audit, AuditError
from vipo.audit import audit as audit_module
from vipo.audit import lineage as lineage_module
from vipo.cli import main
from vipo.config.compose import dump_config, load_config, repository_root, write_if_changed
from vipo.provenance import ProvenanceError, file_sha256
from vipo.provenance.crate import write_crate, zip_crate
from vipo.provenance.dvc import dvc_md5, parse_lock
from vipo.stages import prepare_stage


@pytest.fixture
def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing numbers again takes seconds."""
    monkeypatch.setattr(audit_module, "check_numbers", lambda examination: None)


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the experiment that nothing anchors."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


def _findings(audit: Audit, severity: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in audit.findings:
        if finding.severity == severity:
            found.setdefault(finding.artifact, []).append(f"{finding.check}: {finding.message}")
    return found


def _vipo(monkeypatch: pytest.MonkeyPatch, root: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vipo", *arguments])
    with inside(root), pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_consistent_results_that_nothing_anchors_are_called_so(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _vipo(monkeypatch, project, "audit", EXPERIMENT, "--json") == 0
    result = Audit.model_validate_json(capsys.readouterr().out)
    assert result.verdict == "with remarks"
    (finding,) = result.findings
    assert (finding.severity, finding.check) == ("remark", "anchor")
    assert finding.message.startswith("consistent, not anchored")
    assert result.anchors == ()
    assert result.checked.stages == 12
    # In configs, beside the runs that were trained, and beside every evaluation.
    assert result.checked.configurations == 3 + 2 + 3
    assert result.checked.numbers > 500
    text = result.text()
    assert text.startswith("results/demo: with remarks\nnot anchored\nchecked: ")
    assert "\nREMARK  results/demo\n  anchor: consistent, not anchored" in text


@pytest.mark.usefixtures("without_numbers")
def test_broken_results_are_told_in_words_and_by_the_exit_status(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / EXPERIMENT / "runs/vipo-s0/metrics.jsonl").write_text("{}\n")
    (project / EXPERIMENT / "runs/grpo-s0/metrics.jsonl").unlink()
    assert _vipo(monkeypatch, project, "audit", EXPERIMENT) == 1
    out = capsys.readouterr().out
    assert out.startswith("results/demo: broken\n")
    assert "\nBROKEN  runs/grpo-s0/metrics.jsonl\n  bytes: missing, its stage recorded it\n    -> restore it" in out
    assert "\nBROKEN  runs/vipo-s0/metrics.jsonl\n  bytes: changed: SHA-256 " in out
    assert out.index("BROKEN") < out.index("REMARK")
    assert "consistent" not in out


def test_what_cannot_be_audited_is_an_error(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with inside(project), pytest.raises(AuditError, match="holds no results of a stage"):
        audit_module.audit_experiment(tmp_path, project)
    with pytest.raises(AuditError, match=r"nobody: missing; name a file of principals"):
        audited(project, tmp_path / "nobody")
    assert _vipo(monkeypatch, project, "audit", "results") == 1
    assert "error: results: holds no results of a stage; name an experiment's folder" in capsys.readouterr().err


@pytest.mark.usefixtures("without_numbers")
def test_a_stage_that_does_not_exist_cannot_be_run_again(project: Path) -> None:
    with pytest.raises(ProvenanceError, match=r"--rerun runs/vipo-s7: no such stage; choose one of .*runs/vipo-s0"):
        audited(project, rerun="runs/vipo-s7")


def _edit(change: Callable[[dict[str, Any]], object], name: str) -> Callable[[Path], None]:
    def edit(experiment: Path) -> None:
        value = json.loads((experiment / name).read_text())
        change(value)
        (experiment / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")

    return edit


def _edit_table(experiment: Path) -> None:
    path = experiment / "report/data/tables/arms.csv"
    table = pd.read_csv(path)
    table["reward/redness"] *= 1 + 1e-6
    table.to_csv(path, index=False)


def _edit_page(experiment: Path) -> None:
    path = experiment / "report/index.html"
    path.write_text(path.read_text().replace("Redder objects", "Reddest objects"))


def _edit_scores(experiment: Path) -> None:
    path = experiment / "evaluation/vipo-s0/scores.parquet"
    table = pd.read_parquet(path)
    table.loc[table["final"], "reward/redness"] += 0.01
    table.to_parquet(path, index=False)


def test_numbers_are_computed_again(project: Path) -> None:
    # Every hash beside them fits: only the numbers themselves tell.
    experiment = project / EXPERIMENT
    _edit(lambda value: value.update({"reward/redness": 0.125}), "evaluation/vipo-s0/summary.json")(experiment)
    _edit(lambda value: value.update(confidence=0.9), "report/data/report.json")(experiment)
    _edit_table(experiment)
    _edit_page(experiment)
    recompute_hashes(project)
    _edit(lambda value: value["counts"].update(train=7), "prompts/manifest.json")(experiment)
    broken = _findings(audited(project), "broken")
    for artifact, told in {
        "evaluation/vipo-s0/summary.json": "the results beside it: reward/redness says 0.125, computed again ",
        "report/data/report.json": "the results beside it: confidence says 0.9, computed again 0.95",
        "report/data/tables/arms.csv": "the results beside it: [1][",
        "report/index.html": "is not what is drawn from the results beside it",
        "prompts/manifest.json": "the results beside it: train says 7, computed again ",
    }.items():
        assert any(told in message for message in broken.pop(artifact)), artifact
    assert broken.keys() <= {"prompts", "report", "report/data"}


def test_scores_that_were_edited_disagree_with_all_that_follows_from_them(project: Path) -> None:
    experiment = project / EXPERIMENT
    _edit_scores(experiment)
    path = experiment / "runs/grpo-s0/metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    recompute_hashes(project)
    broken = _findings(audited(project), "broken")
    assert broken.keys() >= {"evaluation/vipo-s0/summary.json", "report/data/report.json", "report/index.html"}
    assert broken["runs/grpo-s0/metrics.jsonl"] == ["numbers: does not hold updates 1 to 2, each once"]


@pytest.mark.usefixtures("without_numbers")
def test_a_stage_run_again_gives_the_same_bytes_or_is_told(project: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    result = audited(project, rerun="evaluation/vipo-s0")
    assert (result.verdict, result.checked.reran) == ("with remarks", "evaluation/vipo-s0")
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before
    experiment = project / EXPERIMENT
    _edit_scores(experiment)
    recompute_hashes(project)
    assert audited(project).verdict == "with remarks"
    broken = _findings(audited(project, rerun="evaluation/vipo-s0"), "broken")
    assert broken == {"evaluation/vipo-s0/scores.parquet": ["rerun: has other bytes when the stage is run again"]}


@pytest.mark.usefixtures("without_numbers")
@pytest.mark.parametrize("folder", ["prompts", "embeddings", "runs/vipo-s0", "report/data", "report"])
def test_every_stage_can_be_run_again(project: Path, folder: str) -> None:
    assert _findings(audited(project, rerun=folder), "broken") == {}


def test_a_stage_that_this_machine_cannot_run_is_not_called_broken(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(*_: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr("vipo.evaluation.score.score_run", no_device)
    result = audited(project, rerun="evaluation/vipo-s0")
    assert _findings(result, "broken") == {}
    told = _findings(result, "remark")["evaluation/vipo-s0"]
    assert "rerun: could not be run again here (RuntimeError: no such device); nothing was compared" in told


@pytest.mark.usefixtures("without_numbers")
def test_a_commit_that_is_an_option_of_git_is_not_run(project: Path) -> None:
    """A record is untrusted: git would take it for where to write."""
    experiment = project / EXPERIMENT
    path = experiment / "prompts/provenance.json"
    record = json.loads(path.read_text())
    record["git"]["commit"] = f"--output={EXPERIMENT}/written"
    record["inputs"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    broken = _findings(audited(project), "broken")
    assert broken["prompts/provenance.json"] == [
        f"lineage: names '--output={EXPERIMENT}/written' as its commit, which is none"
    ]
    assert [item for item in experiment.iterdir() if item.name.startswith("written")] == []


@pytest.mark.usefixtures("without_numbers")
def test_the_package_of_a_clean_commit_is_the_one_that_the_commit_holds(project: Path) -> None:
    """A record that claims other code, so that a difference in numbers would be laid at its door."""
    shutil.copytree(repository_root() / "vipo", project / "vipo", ignore=shutil.ignore_patterns("__pycache__"))
    git(project, "add", "vipo")
    git(project, "commit", "--quiet", "-m", "the package too")
    path = project / EXPERIMENT / "prompts/provenance.json"
    record = json.loads(path.read_text())
    record["git"]["commit"] = git(project, "rev-parse", "HEAD")
    path.write_text(json.dumps(record))
    assert _findings(audited(project), "broken") == {}
    for key, name in (("package_sha256", "vipo package"), ("lock_sha256", "requirements.lock")):
        path.write_text(json.dumps({**record, key: "0" * 64}))
        (told,) = _findings(audited(project), "broken")["prompts/provenance.json"]
        assert f"names a {name} (SHA-256 000000000000…) that its commit does not hold" in told


@pytest.mark.usefixtures("without_numbers")
def test_updates_of_several_packages_are_told(project: Path) -> None:
    path = project / EXPERIMENT / "runs/vipo-s0/provenance.json"
    record = json.loads(path.read_text())
    codes = [{"package_sha256": str(i) * 64, "commit": None, "dirty": None} for i in range(2)]
    path.write_text(json.dumps({**record, "updates_made_by": codes}))
    told = _findings(audited(project), "remark")["runs/vipo-s0"]
    assert any("its updates were not all made by the package" in text for text in told)


def test_a_page_without_its_record_is_not_what_the_lock_says(locked: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(locked, tmp_path / "project"))
    page = root / EXPERIMENT / "report/index.html"
    page.write_text(page.read_text().replace("Redder objects", "Reddest objects"))
    (root / EXPERIMENT / "report/provenance.json").unlink()
    assert "report" in _findings(audited(root), "broken")


@pytest.mark.usefixtures("without_numbers")
def test_the_verdict_tells_what_no_anchor_fixes(locked: Path, signed: Path) -> None:
    by_lock = audited(locked)
    beside = set(by_lock.checked.unanchored)
    assert {"runs/vipo-s0/provenance.json", "runs/vipo-s0/timing.jsonl", "report/index.html"} <= beside
    assert not {name for name in beside if name.startswith(("prompts/t", "evaluation/vipo-s0/s"))}
    assert f"not anchored: {len(beside)} files (configs/base-s0.yaml, " in by_lock.text()
    by_signature = audited(signed, signed.parent / "ada.signers")
    assert by_signature.checked.unanchored == ()
    assert "not anchored" not in by_signature.text()


@pytest.mark.usefixtures("without_numbers")
def test_an_export_is_compared_with_its_own_list(project: Path) -> None:
    folder = project / EXPERIMENT / "export/vipo-s0"
    (folder / "transformer").mkdir(parents=True)
    weights, card = folder / "transformer/model.safetensors", folder / "README.md"
    weights.write_bytes(b"weights")
    card.write_text("card")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in (card, weights)}
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    (folder / "SHA256SUMS").write_text(sums)
    assert _findings(audited(project), "broken") == {}
    weights.write_bytes(b"others")
    card.unlink()
    (folder / ".more").write_text("x")
    place = "export/vipo-s0"
    told = _findings(audited(project), "broken")
    assert told.keys() == {f"{place}/transformer/model.safetensors", f"{place}/README.md", f"{place}/.more"}


@pytest.mark.usefixtures("without_numbers")
def test_names_that_are_no_text_and_files_that_cannot_be_read_are_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = project / EXPERIMENT
    (experiment / os.fsdecode(b"notes-\xff")).write_text("x")
    secret = experiment / "prompts/eval.jsonl"

    def sha256(path: Path) -> str:
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return file_sha256(path)

    monkeypatch.setattr("vipo.audit.examination.file_sha256", sha256)
    assert _vipo(monkeypatch, project, "audit", EXPERIMENT, "--json") == 1
    result = Audit.model_validate_json(capsys.readouterr().out)
    assert "notes-\\udcff" in _findings(result, "remark")
    told = _findings(result, "broken")["prompts/eval.jsonl"]
    assert any(message.startswith("bytes: cannot be read ([Errno 13]") for message in told)
    assert "notes-\\udcff" in result.text()


def test_pipes_and_devices_are_told_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "demo/prompts").mkdir(parents=True)
    (tmp_path / "demo/prompts/manifest.json").write_text("{}")
    os.mkfifo(tmp_path / "demo/prompts/train.jsonl")
    (tmp_path / "demo/export").mkdir()
    (tmp_path / "demo/export/zero").symlink_to("/dev/zero")
    result = audit_module.audit_experiment(tmp_path / "demo", tmp_path)
    assert result.verdict == "broken"
    assert [finding.artifact for finding in result.findings] == ["export/zero", "prompts/train.jsonl"]
    assert "no regular file" in result.findings[0].message


@pytest.mark.usefixtures("without_numbers")
def test_a_shallow_clone_cannot_tell_whether_the_commit_exists(locked: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{locked}", "clone")
    shutil.copytree(locked / "results", tmp_path / "clone/results")
    result = audited(tmp_path / "clone")
    assert _findings(result, "broken") == {}
    assert any("is not in this shallow clone" in text for text in _findings(result, "remark")["prompts"])


@pytest.mark.usefixtures("without_numbers")
def test_a_repository_that_git_does_not_read_is_no_missing_one(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    (told,) = _findings(audited(locked), "remark")["dvc.lock"]
    assert "git does not read this repository (fatal: detected dubious ownership" in told


@pytest.mark.usefixtures("without_numbers")
def test_a_configuration_without_its_run_is_told(project: Path) -> None:
    text = (project / EXPERIMENT / "configs/vipo-s0.yaml").read_text()
    assert "seed: 0" in text
    (project / EXPERIMENT / "configs/vipo-s7.yaml").write_text(text.replace("\nseed: 0\n", "\nseed: 7\n"))
    told = _findings(audited(project), "remark")["configs/vipo-s7.yaml"]
    assert told[0] == "configuration: there is no such run here"


@pytest.mark.usefixtures("without_numbers")
def test_a_configuration_of_an_earlier_version_names_the_new_keys(project: Path) -> None:
    path = project / EXPERIMENT / "configs/vipo-s0.yaml"
    data = yaml.safe_load(path.read_text())
    data["objective"] |= {"map": "psm", "std": "group"}
    path.write_text(yaml.safe_dump(data))
    (found,) = [item for item in audited(project).findings if item.artifact == "configs/vipo-s0.yaml"]
    assert "objective.map: is said elsewhere now, in credit.sources" in found.message
    assert "; objective.std: is said elsewhere now, in advantages.std)" in found.message
    assert found.advice.endswith("is audited with the code that made it")


def test_results_that_were_pulled_keep_their_anchor(locked: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", str(locked), "clone")
    clone = tmp_path / "clone"
    for stage in parse_lock((clone / "dvc.lock").read_bytes()):
        for name in stage.outs:
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (locked / name).is_dir() else shutil.copy
            copy(locked / name, clone / name)
    result = audited(clone)
    assert result.verdict == "with remarks"
    assert [anchor.kind for anchor in result.anchors] == ["dvc.lock"]
    remarks = _findings(result, "remark")
    assert set(remarks) == {
        "prompts", "embeddings", "report/data",
        *(f"{part}/{run}-s0" for part in ("samples", "evaluation") for run in ("base", "grpo", "vipo")),
        "runs/grpo-s0", "runs/vipo-s0",
    }  # fmt: skip
    assert remarks["prompts"] == ["lineage: holds no provenance.json: its lineage is what dvc.lock says of it"]
    assert result.checked.numbers > 500
    _edit_scores(clone / EXPERIMENT)
    result = audited(clone)
    assert set(_findings(result, "broken")) == {"evaluation/vipo-s0/scores.parquet"}
    # The others are as they were committed; only the code that is here may have come to other numbers.
    assert set(_findings(result, "remark")) >= {"evaluation/vipo-s0/summary.json", "report/data/report.json"}


@pytest.mark.usefixtures("without_numbers")
def test_a_crate_that_was_unpacked_elsewhere_keeps_its_signature(signed: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(signed, tmp_path / "project"))
    with zipfile.ZipFile(zip_crate(root / EXPERIMENT)) as archive:
        archive.extractall(tmp_path / "unpacked")
    shutil.rmtree(root / "results")
    signers = signed.parent / "ada.signers"
    with inside(root):
        result = audit_module.audit_experiment(tmp_path / "unpacked", root, allowed_signers=signers)
    assert [anchor.by for anchor in result.anchors] == ["ada"]
    folders = [f"runs/{run}-s0/checkpoints/00000{update}" for run in ("grpo", "vipo") for update in (1, 2)]
    assert result.checked.outside == tuple(folders)
    # Whole as what it is: what a crate never holds is told and is no finding.
    assert _findings(result, "remark") == {}
    assert result.verdict == "reproducible"
    assert "\noutside of a crate by design: the content of 4 checkpoints (runs/grpo-s0/" in result.text()
    # One that has lost the content of some of its checkpoints is no crate that was unpacked.
    held = tmp_path / "unpacked" / folders[0]
    (held / "state.json").write_text("{}")
    with inside(root):
        result = audit_module.audit_experiment(tmp_path / "unpacked", root, allowed_signers=signers)
    assert set(_findings(result, "remark")) == set(folders[1:])
    (held / "state.json").unlink()
    (tmp_path / "unpacked" / "logs" / "report.log").write_text("")
    with inside(root):
        result = audit_module.audit_experiment(tmp_path / "unpacked", root, allowed_signers=signers)
    assert set(_findings(result, "broken")) == {"logs/report.log"}


@pytest.mark.usefixtures("without_numbers")
def test_a_signature_is_no_anchor_without_keys_to_trust(signed: Path) -> None:
    result = audited(signed)
    assert result.anchors == ()
    assert _findings(result, "remark")["ro-crate-metadata.json.sig"] == ["anchor: the signature was not checked"]


@pytest.mark.usefixtures("without_numbers")
def test_a_lock_that_is_not_committed_is_no_anchor(finished: Path, locked: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "project"))
    shutil.copy(locked / "dvc.lock", root)
    result = audited(root)
    assert result.anchors == ()
    assert _findings(result, "remark")["dvc.lock"] == ["anchor: is not committed, so it anchors nothing"]


@pytest.mark.usefixtures("without_numbers")
def test_a_lock_whose_stages_do_not_join_is_told(locked: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(locked, tmp_path / "project"))
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    (entry,) = (item for item in lock["stages"]["encode"]["deps"] if item["path"].endswith("train.jsonl"))
    entry["md5"] = "0" * 32
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    git(root, "commit", "--quiet", "-am", "a dependency from elsewhere")
    (message,) = _findings(audited(root), "broken")["dvc.lock"]
    assert message.startswith("lineage: stage encode read results/demo/prompts/train.jsonl with MD5 000000000000")


def test_dvc_computes_the_same_hashes(tmp_path: Path) -> None:
    hash_info = pytest.importorskip("dvc_data.hashfile.hash_info")
    tree_module = pytest.importorskip("dvc_data.hashfile.tree")
    for name in ("b", "a/c d", "ä", "a.b", 'q"'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".snakemake_timestamp").touch()
    tree = tree_module.Tree()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != ".snakemake_timestamp":
            tree.add(path.relative_to(tmp_path).parts, None, hash_info.HashInfo("md5", md5(path)["md5"]))
    tree.digest()
    assert dvc_md5(tmp_path) == tree.hash_info.value
    assert dvc_md5(tmp_path / "b") == md5(tmp_path / "b")["md5"]
    assert dvc_md5(tmp_path / "nothing") is None


@pytest.mark.usefixtures("without_numbers")
def test_configurations_are_those_that_were_recorded(project: Path) -> None:
    experiment = project / EXPERIMENT
    config = experiment / "runs/vipo-s0/config.yaml"
    config.write_text(config.read_text().replace("  eta: 0.7\n", "  eta: 0.5\n"))
    recompute_hashes(project)
    told = "configuration: is not what vipo-s0 was evaluated as: sampling.eta 0.5 against 0.7"
    assert _findings(audited(project), "broken") == {"runs/vipo-s0/config.yaml": [told]}
    # The evaluation's copy as well, so that only the record of the training tells.
    other = experiment / "evaluation/vipo-s0/config.yaml"
    other.write_text(other.read_text().replace("  eta: 0.7\n", "  eta: 0.5\n"))
    recompute_hashes(project)
    told = "configuration: was made with another configuration than is here: sampling.eta 0.7 against 0.5"
    result = audited(project)
    assert _findings(result, "broken") == {"runs/vipo-s0": [told]}
    told = "configuration: is not what vipo-s0 was made with: sampling.eta 0.7 against 0.5"
    assert _findings(result, "remark")["configs/vipo-s0.yaml"] == [told]
    record = experiment / "runs/vipo-s0/provenance.json"
    record.write_text(record.read_text().replace('"eta": 0.7', '"eta": 0.5'))
    assert set(_findings(audited(project), "broken")) == {"runs/vipo-s0", "runs/vipo-s0/provenance.json"}


@pytest.mark.usefixtures("without_numbers")
def test_a_planned_workflow_that_writes_configurations_breaks_no_crate(project: Path) -> None:
    """What decides nothing, such as where jobs run, may differ from what the crate names, if it is not signed."""
    experiment = project / EXPERIMENT
    write_crate(experiment, project)
    config = experiment / "configs/vipo-s0.yaml"
    text = config.read_text()
    config.write_text(text.replace("  stop_seconds: 60\n", "  stop_seconds: 90\n"))
    assert config.read_text() != text
    result = audited(project)
    assert result.verdict == "with remarks"
    assert any("the crate says" in told for told in _findings(result, "remark")["configs/vipo-s0.yaml"])


def test_damage_of_every_kind_is_told_and_nothing_crashes(locked: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(locked, tmp_path / "project"))
    experiment = root / EXPERIMENT
    damages = {
        "evaluation/grpo-s0/scores.parquet": lambda content: content[: len(content) // 2],
        "evaluation/vipo-s0/scores.parquet": lambda _: b"",
        "evaluation/base-s0/summary.json": lambda _: b"[1, {}]",
        "evaluation/vipo-s0/config.yaml": lambda _: b"a: [",
        "runs/grpo-s0/config.yaml": lambda _: b"\xff\xfe",
        "runs/grpo-s0/metrics.jsonl": lambda _: b"[]\n",
        "runs/vipo-s0/provenance.json": lambda content: content.replace(b'"outputs": [', b'"outputs": [3, '),
        "runs/grpo-s0/provenance.json": lambda content: content.replace(b'"git": {', b'"git": {}, "svn": {'),
        "prompts/provenance.json": lambda _: b"[" * 100_000,
        "prompts/manifest.json": lambda _: b"{}",
        "report/data/report.json": lambda content: content[:-20],
        "report/data/tables/arms.csv": lambda _: b"\x00\xff",
        "runs/vipo-s0/checkpoints/000002/manifest.json": lambda _: b"3",
    }
    for name, damage in damages.items():
        (experiment / name).write_bytes(damage((experiment / name).read_bytes()))
    (experiment / "embeddings/eval.safetensors").unlink()
    (experiment / "embeddings/eval.safetensors").symlink_to("nowhere")
    (experiment / "prompts/eval.jsonl").unlink()
    (experiment / "prompts/eval.jsonl").mkdir()
    named = {finding.artifact for finding in audited(root).findings if finding.severity == "broken"}
    wanted = {*damages, "embeddings/eval.safetensors", "prompts/eval.jsonl"}
    folders = {name for name in wanted if any(name.startswith(f"{artifact}/") for artifact in named)}
    assert wanted - named - folders == set()


# ---- code ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts_only(finished: Path, tmp_path: Path) -> Callable[[], Path]:
    """A project whose prompts alone were prepared, from the code as it is when the function is called."""
    root = Path(shutil.copytree(finished, tmp_path / "project", ignore=shutil.ignore_patterns("results")))

    def prepare() -> Path:
        with inside(root):
            config = load_config(["experiment=demo", "arm=base"])
            prepare_stage(config, root, root / "results")
            write_if_changed(root / EXPERIMENT / "configs" / "base-s0.yaml", dump_config(config))
        return root

    return prepare


def test_uncommitted_code_is_a_remark_and_a_lost_diff_is_not(prompts_only: Callable[[], Path], tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / "Snakefile").write_text("# other\n")
    (root / "reward.py").write_text("x = 1\n")
    prompts_only()
    (message,) = _findings(audited(root), "remark")["prompts"]
    commit = git(root, "rev-parse", "HEAD")[:12]
    kept = "with uncommitted changes and 1 untracked files, kept in provenance.diff"
    assert message == f"code: ran from commit {commit}… {kept}"
    diff = root / EXPERIMENT / "prompts" / "provenance.diff"
    diff.write_bytes(diff.read_bytes().replace(b"x = 1", b"x = 2"))
    assert _findings(audited(root), "broken") == {
        "prompts/provenance.diff": ["code: is not the diff that was recorded"]
    }
    diff.unlink()
    assert _findings(audited(root), "broken") == {
        "prompts/provenance.diff": ["code: the diff that was recorded is missing"]
    }


def test_the_code_of_another_repository_need_not_be_in_this_one(
    prompts_only: Callable[[], Path], tmp_path: Path
) -> None:
    root = prompts_only()
    (root / "Snakefile").write_text("# other\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("x = 1\n")
    git(tmp_path / "code", "init", "--quiet")
    git(tmp_path / "code", "add", ".")
    git(tmp_path / "code", "commit", "--quiet", "-m", "code")
    (tmp_path / "code" / "a.py").write_text("x = 2\n")
    with inside(root), mock.patch("vipo.provenance.environment.code_folder", return_value=tmp_path / "code"):
        prepare_stage(load_config(["experiment=demo", "arm=base"]), root, root / "results")
    code, data = (git(folder, "rev-parse", "HEAD")[:12] for folder in (tmp_path / "code", root))
    assert _findings(audited(root), "broken") == {}
    assert _findings(audited(root), "remark")["prompts"] == [
        f"code: commit {code}… is not in this repository",
        f"code: ran from commit {code}… with uncommitted changes, kept in provenance.diff",
        f"code: ran from commit {data}… with uncommitted changes, kept in provenance.checkout.diff",
    ]
    # What it read is looked up where the data is from.
    source = root / "data" / "prompts" / "colourless.jsonl"
    source.write_bytes(source.read_bytes() + b"\n")
    (message,) = _findings(audited(root), "remark")["data/prompts/colourless.jsonl"]
    assert message.endswith(f"commit {data} holds those bytes")
    (root / EXPERIMENT / "prompts" / "provenance.checkout.diff").unlink()
    assert _findings(audited(root), "broken") == {
        "prompts/provenance.checkout.diff": ["code: the diff that was recorded is missing"]
    }


def test_code_that_is_gone_or_was_never_committed_is_told(
    prompts_only: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = prompts_only()
    commit = git(root, "rev-parse", "HEAD")
    git(root, "commit", "--quiet", "--amend", "-m", "the commit that ran is gone")
    for arguments in (["reflog", "expire", "--expire=now", "--all"], ["gc", "--quiet", "--prune=now"]):
        git(root, *arguments)
    broken = _findings(audited(root), "broken")
    assert broken["prompts"] == [f"code: commit {commit[:12]}… is not in this repository"]
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
    shutil.rmtree(root / ".git")
    remark = f"code: commit {commit[:12]}… was not looked up: there is no git repository here"
    assert _findings(audited(root), "remark")["prompts"] == [remark]
    prompts_only()
    remark = "code: was not run from a git repository: no commit names its code"
    assert _findings(audited(root), "remark")["prompts"] == [remark]


@pytest.mark.usefixtures("without_numbers")
def test_results_of_other_code_and_libraries_are_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = lineage_module.versions()
    monkeypatch.setattr(lineage_module, "package_sha256", lambda: "0" * 64)
    monkeypatch.setattr(lineage_module, "versions", lambda: present | {"torch": "1.0"})
    result = audited(project)
    remarks = _findings(result, "remark")
    assert len([artifact for artifact in remarks if artifact != EXPERIMENT]) == result.checked.stages
    for messages in (remarks[artifact] for artifact in remarks if artifact != EXPERIMENT):
        assert messages[0].startswith("code: made by another vipo package (SHA-256 ")
        assert messages[1] == f"environment: made with torch {present['torch']} (here 1.0)"
    # What is said of many is said once.
    assert result.text().count("made by another vipo package") == 1
