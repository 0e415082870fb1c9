"""Whoever changes anchored results is found, and what was changed is named: bytes, swaps, renames, edits, losses.

Every tampering is tried as it is, and again with all hashes beside the results recomputed. How numbers are computed
again is not needed for any of them (but one), and tested in test_audit.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import hypothesis
import pandas as pd
import pytest
from audit_fixture import EXPERIMENT, audited, git, new_key, recompute_hashes, write_lock
from hypothesis import strategies as st
from PIL import Image

from vipo.audit import Audit
from vipo.audit import audit as audit_module
from vipo.config.compose import repository_root
from vipo.provenance import sign_file

#: Changes an experiment's folder and returns the files that were tampered with.
Tampering = Callable[[Path], list[str]]


def _names(audit: Audit, artifact: str) -> bool:
    """Whether something broken is said of a file, or of the folder that an anchor fixes as a whole."""
    named = [finding.artifact for finding in audit.findings if finding.severity == "broken"]
    return any(artifact == name or artifact.startswith(f"{name}/") for name in named)


def _byte(name: str, position: int = -1) -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        content = bytearray((experiment / name).read_bytes())
        content[position] ^= 1
        (experiment / name).write_bytes(content)
        return [name]

    return tamper


def _cut(name: str, share: float) -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        content = (experiment / name).read_bytes()
        (experiment / name).write_bytes(content[: int(share * len(content))])
        return [name]

    return tamper


def _swap(first: str, second: str) -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        (experiment / first).rename(experiment / "aside")
        (experiment / second).rename(experiment / first)
        (experiment / "aside").rename(experiment / second)
        below = [path for path in (experiment / first).rglob("*.*") if path.name in ("metrics.jsonl", "scores.parquet")]
        return [path.relative_to(experiment).as_posix() for path in below] or [first, second]

    return tamper


def _rename(name: str, new: str, *told: str) -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        (experiment / name).rename(experiment / new)
        return list(told or (name, new))

    return tamper


def _delete(name: str, *told: str) -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        path = experiment / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return list(told or (name,))

    return tamper


def _add(name: str, content: bytes = b"more\n") -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        (experiment / name).parent.mkdir(parents=True, exist_ok=True)
        (experiment / name).write_bytes(content)
        return [name]

    return tamper


def _link(name: str) -> Tampering:
    """A folder that lies elsewhere, by a link."""

    def tamper(experiment: Path) -> list[str]:
        elsewhere = experiment.parent / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "scores.parquet").write_bytes(b"better")
        (experiment / name).symlink_to(elsewhere)
        return [f"{name}/scores.parquet"]

    return tamper


def _loop(name: str) -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        (experiment / name).symlink_to(experiment)
        return [name]

    return tamper


def _copy(source: str, target: str) -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        assert (experiment / source).read_bytes() != (experiment / target).read_bytes()
        shutil.copy(experiment / source, experiment / target)
        return [target]

    return tamper


def _edit(name: str, old: str, new: str) -> Tampering:
    def tamper(experiment: Path) -> list[str]:
        text = (experiment / name).read_text()
        assert old in text
        (experiment / name).write_text(text.replace(old, new, 1))
        return [name]

    return tamper


def _metrics(experiment: Path) -> list[str]:
    path = experiment / "runs/vipo-s0/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["reward/mean"] += 0.01
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    return ["runs/vipo-s0/metrics.jsonl"]


def _scores(experiment: Path) -> list[str]:
    path = experiment / "evaluation/vipo-s0/scores.parquet"
    table = pd.read_parquet(path)
    table["reward/object_redness"] += 0.01
    table.to_parquet(path, index=False)
    return ["evaluation/vipo-s0/scores.parquet"]


def _summary(experiment: Path) -> list[str]:
    path = experiment / "evaluation/vipo-s0/summary.json"
    summary = json.loads(path.read_text())
    summary["reward/object_redness"] += 0.01
    path.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return ["evaluation/vipo-s0/summary.json"]


def _picture(experiment: Path) -> list[str]:
    path = sorted((experiment / "samples/vipo-s0/pictures").iterdir())[0]
    with Image.open(path) as picture:
        redder = picture.convert("RGB")
    redder.putpixel((0, 0), (255, 0, 0))
    redder.save(path)
    return [path.relative_to(experiment).as_posix()]


def _other_picture(experiment: Path) -> list[str]:
    first, second = sorted((experiment / "samples/vipo-s0/pictures").iterdir())[:2]
    shutil.copy(first, second)
    return [second.relative_to(experiment).as_posix()]


def _lost_picture(experiment: Path) -> list[str]:
    path = sorted((experiment / "samples/grpo-s0/pictures").iterdir())[0]
    path.unlink()
    return [path.relative_to(experiment).as_posix()]


def _lost_prompt(experiment: Path) -> list[str]:
    path = experiment / "prompts/train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    return ["prompts/train.jsonl"]


def _lost_update(experiment: Path) -> list[str]:
    path = experiment / "runs/grpo-s0/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    return ["runs/grpo-s0/metrics.jsonl"]


def _table(experiment: Path) -> list[str]:
    (path,) = experiment.rglob("tables/arms.csv")
    table = pd.read_csv(path)
    table["reward/object_redness"] += 0.01
    table.to_csv(path, index=False)
    return [path.relative_to(experiment).as_posix()]


def _report(experiment: Path) -> list[str]:
    (path,) = experiment.rglob("report.json")
    report = json.loads(path.read_text())
    report["tables"]["arms"][0]["reward/object_redness"] += 0.01
    path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    return [path.relative_to(experiment).as_posix()]


def _figure(experiment: Path) -> list[str]:
    (path,) = experiment.rglob("figures/change.svg")
    path.write_text(path.read_text().replace("</svg>", "<!-- --></svg>"))
    return [path.relative_to(experiment).as_posix()]


def _lost_board(experiment: Path) -> list[str]:
    (path,) = (experiment / "runs/vipo-s0/tb").iterdir()
    path.unlink()
    return [path.relative_to(experiment).as_posix()]


def _lost_figure(experiment: Path) -> list[str]:
    (path,) = experiment.rglob("figures/change.svg")
    path.unlink()
    return [path.relative_to(experiment).as_posix()]


_WEIGHTS = "weights/transformer/diffusion_pytorch_model.safetensors"

#: On files that dvc.lock fixes; a signature fixes them too.
RESULTS: Mapping[str, Tampering] = {
    "a byte of the weights": _byte(f"runs/vipo-s0/{_WEIGHTS}"),
    "a byte of the weights' header": _byte(f"runs/vipo-s0/{_WEIGHTS}", 20),
    "weights cut short": _cut(f"runs/vipo-s0/{_WEIGHTS}", 0.5),
    "weights of another run": _copy(f"runs/grpo-s0/{_WEIGHTS}", f"runs/vipo-s0/{_WEIGHTS}"),
    "weights swapped": _swap(f"runs/grpo-s0/{_WEIGHTS}", f"runs/vipo-s0/{_WEIGHTS}"),
    "weights of an earlier update": _copy(
        f"runs/vipo-s0/{_WEIGHTS.replace('weights', 'updates/000001', 1)}", f"runs/vipo-s0/{_WEIGHTS}"
    ),
    "weights deleted": _delete("runs/vipo-s0/weights", f"runs/vipo-s0/{_WEIGHTS}"),
    "weights renamed": _rename(f"runs/vipo-s0/{_WEIGHTS}", "runs/vipo-s0/weights/transformer/other.safetensors"),
    "a file among the weights": _add("runs/vipo-s0/weights/transformer/more.safetensors"),
    "a hidden file among the weights": _add("runs/vipo-s0/weights/.more"),
    "a tool's file among the weights": _add("runs/vipo-s0/weights/.gitignore"),
    "an interrupted write among the weights": _add("runs/vipo-s0/weights/.more.partial"),
    "a folder linked among the weights": _link("runs/vipo-s0/weights/more"),
    "a link that leads back": _loop("runs/vipo-s0/weights/back"),
    "kept weights deleted": _delete(
        "runs/grpo-s0/updates", f"runs/grpo-s0/{_WEIGHTS.replace('weights', 'updates/000001', 1)}"
    ),
    "metrics edited": _metrics,
    "an update's metrics deleted": _lost_update,
    "metrics emptied": _cut("runs/vipo-s0/metrics.jsonl", 0),
    "a run's configuration edited": _edit("runs/vipo-s0/config.yaml", "learning_rate: ", "learning_rate: 1"),
    "a run's configuration no YAML": _edit("runs/vipo-s0/config.yaml", "arm:", "arm: ["),
    "a run renamed": _rename(
        "runs/vipo-s0", "runs/vipo-s9", "runs/vipo-s0/metrics.jsonl", "runs/vipo-s9/metrics.jsonl"
    ),
    "runs swapped": _swap("runs/grpo-s0", "runs/vipo-s0"),
    "a run deleted": _delete("runs/grpo-s0", "runs/grpo-s0/metrics.jsonl"),
    "scores edited": _scores,
    "scores cut short": _cut("evaluation/vipo-s0/scores.parquet", 0.7),
    "scores emptied": _cut("evaluation/vipo-s0/scores.parquet", 0),
    "summary edited": _summary,
    "summary no JSON": _cut("evaluation/vipo-s0/summary.json", 0.5),
    "a picture edited": _picture,
    "a picture of another prompt": _other_picture,
    "a picture deleted": _lost_picture,
    "a byte of the maps": _byte("evaluation/vipo-s0/maps.safetensors"),
    "evaluations swapped": _swap("evaluation/grpo-s0", "evaluation/vipo-s0"),
    "an evaluation deleted": _delete("evaluation/base-s0", "evaluation/base-s0/scores.parquet"),
    "the report's numbers edited": _report,
    "the report's numbers no JSON": lambda experiment: _cut(_report(experiment)[0], 0.9)(experiment),
    "a table edited": _table,
    "a figure edited": _figure,
    "a figure deleted": _lost_figure,
    "a prompt edited": _edit("prompts/eval.jsonl", '"text": "a', '"text": "the'),
    "a prompt deleted": _lost_prompt,
    "prompts swapped": _swap("prompts/train.jsonl", "prompts/eval.jsonl"),
    "the manifest edited": _edit("prompts/manifest.json", '"source": "data/', '"source": "other/'),
    "a byte of the embeddings": _byte("embeddings/train.safetensors"),
    "embeddings swapped": _swap("embeddings/train.safetensors", "embeddings/eval.safetensors"),
    "a file beside the results": _add("notes.txt"),
    "a folder linked beside the results": _link("more"),
    "a run set aside where none is": _add("evaluation/.superseded/vipo-s0/scores.parquet"),
    "an evaluation linked": _link("evaluation/uniform-s0"),
    "a stage beside the results": _add("evaluation/uniform-s0/scores.parquet"),
}

#: On files that dvc.lock leaves out: times, records, logs, checkpoints, configurations, the page.
BESIDE: Mapping[str, Tampering] = {
    "a log deleted": _delete("logs/train-vipo-s0.log"),
    "a log edited": _edit("logs/train-vipo-s0.log", "INFO", "DEBUG"),
    "a log added": _add("logs/other.log"),
    "a record's hardware edited": _edit("runs/vipo-s0/provenance.json", '"cpu": "', '"cpu": "Fast '),
    "a record's configuration edited": _edit("runs/vipo-s0/provenance.json", '"eta": ', '"eta": 1'),
    "a record's command edited": _edit("runs/vipo-s0/provenance.json", '"command": [', '"command": ["nice",'),
    "a record of another run": _copy("runs/grpo-s0/provenance.json", "runs/vipo-s0/provenance.json"),
    "a record deleted": _delete("evaluation/vipo-s0/provenance.json"),
    "a record no JSON": _cut("prompts/provenance.json", 0.5),
    "a record's commit deleted": _edit("runs/vipo-s0/provenance.json", '"git"', '"svn"'),
    "times edited": _edit("runs/vipo-s0/timing.jsonl", "time/total", "time/totals"),
    "TensorBoard's file deleted": _lost_board,
    "a checkpoint replaced": _copy(
        "runs/grpo-s0/checkpoints/000002/tensors.safetensors", "runs/vipo-s0/checkpoints/000002/tensors.safetensors"
    ),
    "a checkpoint's state edited": _edit("runs/vipo-s0/checkpoints/000002/state.json", ":", " :"),
    "a checkpoint added": _add("runs/vipo-s0/checkpoints/000009/tensors.safetensors"),
    "a checkpoint deleted": _delete("runs/vipo-s0/checkpoints/000002", "runs/vipo-s0/checkpoints/000002/manifest.json"),
    "a configuration edited": _edit("configs/vipo-s0.yaml", "learning_rate: ", "learning_rate: 1"),
    "the page edited": _edit("report/index.html", "Redder objects", "Reddest objects"),
    "the workflow edited": _edit("crate/Snakefile", "rule all", "rule  all"),
    "the lock in the crate edited": _edit("crate/requirements.lock", "==", "== "),
}


def test_the_corpus_is_as_large_as_its_page_says() -> None:
    page = (repository_root() / "docs" / "audit.md").read_text()
    assert f"{len(RESULTS)} tamperings of results under both anchors and {len(BESIDE)} more" in page


@pytest.fixture
def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found must be found by hashes; numbers take seconds."""
    monkeypatch.setattr(audit_module, "check_numbers", lambda examination: None)


def _tampered(root: Path, tmp_path: Path, tamper: Tampering, recomputed: bool) -> tuple[Path, list[str]]:
    copy = Path(shutil.copytree(root, tmp_path / "project"))
    told = tamper(copy / EXPERIMENT)
    if recomputed:
        recompute_hashes(copy)
    return copy, told


@pytest.mark.usefixtures("without_numbers")
@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("name", RESULTS)
def test_tampering_is_found_by_the_committed_lock(locked: Path, tmp_path: Path, name: str, recomputed: bool) -> None:
    root, told = _tampered(locked, tmp_path, RESULTS[name], recomputed)
    audit = audited(root)
    assert audit.verdict == "broken"
    assert [artifact for artifact in told if not _names(audit, artifact)] == [], audit.text()


@pytest.mark.usefixtures("without_numbers")
@pytest.mark.parametrize(
    ("name", "recomputed"),
    [
        *(pytest.param(name, True, id=f"{name}-recomputed") for name in [*RESULTS, *BESIDE]),
        # Without that, the records beside the results tell, whatever the anchor, as above.
        *(pytest.param(name, False, id=f"{name}-plain") for name in BESIDE),
    ],
)
def test_tampering_is_found_by_the_signature(signed: Path, tmp_path: Path, name: str, recomputed: bool) -> None:
    root, told = _tampered(signed, tmp_path, {**RESULTS, **BESIDE}[name], recomputed)
    audit = audited(root, signed.parent / "ada.signers")
    assert audit.verdict == "broken"
    # A checkpoint's tensors hang on its manifest, and where that was recomputed it is what differs.
    told = [artifact.replace("tensors.safetensors", "manifest.json") if recomputed else artifact for artifact in told]
    told = [artifact.replace("state.json", "manifest.json") if recomputed else artifact for artifact in told]
    assert [artifact for artifact in told if not _names(audit, artifact)] == [], audit.text()


@pytest.mark.usefixtures("without_numbers")
def test_any_bit_of_any_file_is_found_by_the_signature(signed: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(signed, tmp_path / "project"))
    files = sorted(path for path in (root / EXPERIMENT).rglob("*") if path.is_file() and path.stat().st_size)
    files = [path for path in files if path.suffix != ".sig" and path.name != ".lock"]

    @hypothesis.settings(max_examples=8)
    @hypothesis.given(st.sampled_from(files), st.integers(0, 2**40), st.integers(0, 7))
    def flip(path: Path, position: int, bit: int) -> None:
        before = path.read_bytes()
        after = bytearray(before)
        after[position % len(before)] ^= 1 << bit
        path.write_bytes(after)
        try:
            told = audited(root, signed.parent / "ada.signers")
        finally:
            path.write_bytes(before)
        name = path.relative_to(root / EXPERIMENT).as_posix()
        assert _names(told, f"{name}.sig" if name == "ro-crate-metadata.json" else name)

    flip()
    assert audited(root, signed.parent / "ada.signers").findings == ()


@pytest.mark.parametrize("kind", ["locked", "signed"])
def test_untouched_results_give_no_finding(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, finished: Path
) -> None:
    root = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "elsewhere"))
    audit = audited(root, finished.parent / "ada.signers" if kind == "signed" else None)
    assert audit.findings == ()
    assert audit.verdict == "reproducible"
    assert [anchor.kind for anchor in audit.anchors] == ["dvc.lock" if kind == "locked" else "signature"]


@pytest.mark.usefixtures("without_numbers")
def test_a_lock_that_was_recomputed_too_is_not_the_committed_one(locked: Path, tmp_path: Path) -> None:
    root, told = _tampered(locked, tmp_path, _scores, recomputed=True)
    write_lock(root)
    audit = audited(root)
    assert _names(audit, "dvc.lock")
    assert _names(audit, told[0])
    (root / "dvc.lock").unlink()
    assert _names(audited(root), "dvc.lock")


@pytest.mark.usefixtures("without_numbers")
@pytest.mark.parametrize("content", [b"", b"schema: '2.0'\n", b"stages: [", b"schema: '2.0'\nstages: {a: {outs: 3}}\n"])
def test_a_lock_that_was_committed_damaged_anchors_nothing(locked: Path, tmp_path: Path, content: bytes) -> None:
    root = Path(shutil.copytree(locked, tmp_path / "project"))
    (root / "dvc.lock").write_bytes(content)
    git(root, "commit", "--quiet", "-am", "damage")
    audit = audited(root)
    assert audit.verdict == "broken"
    assert _names(audit, "dvc.lock")
    assert audit.anchors == ()


@pytest.mark.usefixtures("without_numbers")
@pytest.mark.parametrize("how", ["rewritten", "signed by another", "unsigned", "signature of another file", "no crate"])
def test_a_crate_that_nobody_trusted_signed_anchors_nothing(signed: Path, tmp_path: Path, how: str) -> None:
    root, _ = _tampered(signed, tmp_path, _scores, recomputed=True)
    experiment = root / EXPERIMENT
    metadata, signature = experiment / "ro-crate-metadata.json", experiment / "ro-crate-metadata.json.sig"
    if how == "no crate":
        metadata.unlink()
        signature.unlink()
    elif how == "unsigned":
        recompute_hashes(root, crate=True)
        signature.unlink()
    elif how == "signature of another file":
        key, _ = new_key(tmp_path, "other")
        sign_file(experiment / "notes.txt" if (experiment / "notes.txt").write_text("x") else experiment, key)
        (experiment / "notes.txt.sig").rename(signature)
    else:
        recompute_hashes(root, crate=True)
        if how == "signed by another":
            sign_file(metadata, new_key(tmp_path, "mallory")[0])
    audit = audited(root, signed.parent / "ada.signers")
    assert audit.verdict == "broken"
    assert audit.anchors == ()
    assert _names(audit, "ro-crate-metadata.json.sig")


@pytest.mark.usefixtures("without_numbers")
def test_a_signature_for_another_purpose_is_none(signed: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(signed, tmp_path / "project"))
    metadata = root / EXPERIMENT / "ro-crate-metadata.json"
    key = signed.parent / "ada.key"
    metadata.with_name(f"{metadata.name}.sig").unlink()
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", "git", metadata], check=True, capture_output=True
    )
    assert _names(audited(root, signed.parent / "ada.signers"), "ro-crate-metadata.json.sig")


@pytest.mark.usefixtures("without_numbers")
@pytest.mark.parametrize(
    "path", ["data/prompts/colourless.jsonl", "requirements.lock", "data/generator/model_index.json"]
)
@pytest.mark.parametrize("kind", ["locked", "signed"])
def test_inputs_that_no_stage_wrote_are_checked_against_git(
    kind: str, path: str, tmp_path: Path, request: pytest.FixtureRequest, finished: Path
) -> None:
    root = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "project"))
    signers = finished.parent / "ada.signers" if kind == "signed" else None
    (root / path).write_text((root / path).read_text() + "\n")
    told = audited(root, signers)
    # The results are what they were, and git holds what they were made of.
    assert told.verdict == "with remarks"
    wanted = path if path != "requirements.lock" else "another requirements.lock"
    assert any(wanted in (finding.artifact + finding.message) for finding in told.findings), told.text()
    if path != "requirements.lock":
        git(root, "checkout", "--orphan", "new")
        git(root, "commit", "--quiet", "-am", "all commits before are gone")
        for command in (["branch", "-D", "main"], ["reflog", "expire", "--expire=now", "--all"], ["gc", "--prune=now"]):
            git(root, *command)
        assert _names(audited(root, signers), path)
