"""Results that were copied or moved, inside of the repository and out of it, are results still."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from audit_fixture import EXPERIMENT, inside

from vipo.audit import audit as audit_module
from vipo.cli import main
from vipo.provenance import verify_outputs
from vipo.provenance.upload import UploadError, upload_folder
from vipo.reporting.runs import read_run

Vipo = Callable[..., str]


@pytest.fixture
def vipo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Vipo:
    """``vipo(root, *arguments)`` runs a command in a checkout, which succeeds; what it prints."""

    def run(root: Path, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["vipo", *map(str, arguments)])
        capsys.readouterr()
        with inside(root), pytest.raises(SystemExit) as stopped:
            main()
        shown = capsys.readouterr()
        assert not stopped.value.code, shown.out + shown.err
        return shown.out

    return run


@pytest.fixture(params=["in the repository", "out of it"])
def moved(request: pytest.FixtureRequest, finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkout, and the experiment's new place; where the old one was there is nothing, or something else."""
    root = Path(shutil.copytree(finished, tmp_path / "project"))
    place = root / "results" / "old" / "demo" if request.param == "in the repository" else tmp_path / "there" / "demo"
    shutil.copytree(root / EXPERIMENT, place)
    if request.param == "in the repository":
        # Another experiment's results by the same paths: nobody may take them for these.
        for path in (root / EXPERIMENT).rglob("*"):
            if path.is_file():
                path.write_bytes(b"other")
    else:
        shutil.rmtree(root / EXPERIMENT)
    return root, place


def _remarks(vipo: Vipo, root: Path, place: Path) -> set[tuple[str, str]]:
    told = json.loads(vipo(root, "audit", place, "--json"))
    return {(finding["severity"], finding["check"]) for finding in told["findings"]}


def test_moved_results_go_through_every_command(
    moved: tuple[Path, Path], finished: Path, vipo: Vipo, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They take seconds, and do not look at paths.
    monkeypatch.setattr(audit_module, "check_numbers", lambda examination: None)
    root, place = moved
    here = ["--results", place.parent]
    assert _remarks(vipo, root, place) == {("remark", "anchor")}
    for run in ("base-s0", "grpo-s0", "vipo-s0"):
        for folder in (place / "runs" / run, place / "evaluation" / run):
            if (folder / "provenance.json").is_file():
                assert verify_outputs(folder / "provenance.json", root) == []
    assert read_run(place / "runs/vipo-s0").stale is None
    numbers = (place / "report/data/report.json").read_bytes()
    scores = (place / "evaluation/vipo-s0/scores.parquet").read_bytes()
    vipo(root, "evaluate", "experiment=demo", "arm=vipo", *here)
    assert (place / "evaluation/vipo-s0/scores.parquet").read_bytes() == scores
    # The same configuration and inputs at another place: nothing was set aside.
    assert not (place / ".superseded").exists()
    for command in ("summarize", "report", "crate"):
        vipo(root, command, "experiment=demo", "arm=base", *here)
    assert (place / "report/data/report.json").read_bytes() == numbers
    metadata = json.loads((place / "ro-crate-metadata.json").read_text())["@graph"]
    files = {entity["@id"] for entity in metadata if "File" in entity["@type"]}
    assert "runs/vipo-s0/weights/transformer/diffusion_pytorch_model.safetensors" in files
    assert not any(str(finished) in json.dumps(entity) or "../" in entity["@id"] for entity in metadata)
    assert _remarks(vipo, root, place) == {("remark", "anchor")}
    card = Path(vipo(root, "export", place / "runs/vipo-s0", "--license", "mit").strip()) / "README.md"
    assert card.parent == place / "export/vipo-s0"
    assert "vipo" in card.read_text()
    assert json.loads(vipo(root, "diff", place / "runs/grpo-s0", place / "runs/vipo-s0", "--json"))["notes"] == []
    assert upload_folder(place, f"file://{place.parent}/uploaded", root).sent
    # It is these files that are checked, not those that lie where they once were.
    weights = place / "runs/vipo-s0/weights/transformer/config.json"
    weights.write_bytes(weights.read_bytes() + b" ")
    (problem,) = verify_outputs(place / "runs/vipo-s0/provenance.json", root)
    assert "weights/transformer/config.json: changed" in problem
    with pytest.raises(UploadError, match="is not what"):
        upload_folder(place, f"file://{place.parent}/uploaded", root)
