"""Finished results make way whole, asked for; what only shows them makes way unasked."""

import json
from pathlib import Path

import pytest

from vipo.provenance.lineage import record_stage
from vipo.provenance.locks import RunLocked, run_lock
from vipo.provenance.records import experiment_files
from vipo.provenance.superseded import PlannedJob, WouldReplace, make_way, set_aside

HOW = "the same command with set_aside=true"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A finished experiment of one run, and one run that was cut off."""
    folder = tmp_path / "results" / "demo"
    names = ["prompts/manifest.json", "embeddings/eval.safetensors", "runs/vipo-s0/weights/a.safetensors",
             "runs/vipo-s0/checkpoints/000002/state.json", "runs/vipo-s0/.lock", "runs/vipo-s0/metrics.jsonl",
             "runs/grpo-s0/checkpoints/000001/state.json", "runs/grpo-s0/metrics.jsonl", "logs/train-vipo-s0.log",
             "evaluation/vipo-s0/scores.parquet", "report/data/report.json", "report/index.html", "report/time.csv",
             "crate/Snakefile", "ro-crate-metadata.json", "ro-crate-metadata.json.sig"]  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def _way(experiment: Path, *planned: PlannedJob, consent: bool = False) -> set[str]:
    aside = make_way(experiment, planned, consent=consent, how=HOW)
    return set() if aside is None else {p.relative_to(aside).as_posix() for p in aside.rglob("*") if p.is_file()}


def test_what_is_finished_is_asked_for_and_nothing_is_touched(experiment: Path) -> None:
    before = sorted(experiment.rglob("*"))
    planned = [PlannedJob("report"), PlannedJob("train", "vipo-s0", "forced"), PlannedJob("prepare", None, "forced")]
    with pytest.raises(WouldReplace) as told:
        _way(experiment, *planned, PlannedJob("train", "grpo-s0"), PlannedJob("all"))
    assert "\n  prompts: forced\n  runs: vipo-s0 (forced)\n" in str(told.value)
    assert HOW in str(told.value)
    assert "grpo-s0" not in str(told.value)
    assert sorted(experiment.rglob("*")) == before


def test_a_run_is_set_aside_whole_with_its_log_and_its_lock_stays(experiment: Path) -> None:
    assert _way(experiment, PlannedJob("train", "vipo-s0"), consent=True) == {
        "runs/vipo-s0/weights/a.safetensors", "runs/vipo-s0/checkpoints/000002/state.json",
        "runs/vipo-s0/metrics.jsonl", "logs/train-vipo-s0.log",
    }  # fmt: skip
    assert {path.name for path in (experiment / "runs/vipo-s0").iterdir()} <= {".lock", ".lock-holder.json"}
    assert (experiment / "runs/grpo-s0/metrics.jsonl").is_file()
    # Once more, there is nothing left; and the set is no part of the experiment.
    assert _way(experiment, PlannedJob("train", "vipo-s0"), consent=True) == set()
    assert not any("superseded" in name for name in experiment_files(experiment))


def test_a_measurement_is_a_result_and_its_parts_stay_to_be_gone_on_from(experiment: Path) -> None:
    folder = experiment / "credit/grpo-s0-u12"
    (folder / ".measured.partial/a1").mkdir(parents=True)
    for name in ("credit.json", "credit.svg", "provenance.json", ".measured.partial/a1/update-0.json"):
        (folder / name).write_text("{}")
    (experiment / "logs/credit-grpo-s0-u12.log").touch()
    job = PlannedJob("credit", "grpo-s0-u12", "its configuration changed")
    with pytest.raises(WouldReplace, match=r"\n  credit: grpo-s0-u12 \(its configuration changed\)\n"):
        _way(experiment, job)
    assert _way(experiment, job, consent=True) == {
        *(f"credit/grpo-s0-u12/{name}" for name in ("credit.json", "credit.svg", "provenance.json")),
        "logs/credit-grpo-s0-u12.log",
    }
    assert (folder / ".measured.partial/a1/update-0.json").is_file()


def test_what_was_cut_off_is_no_finished_result(experiment: Path) -> None:
    planned = [PlannedJob("score", "vipo-s0", incomplete=True), PlannedJob("train", "grpo-s0")]
    assert _way(experiment, *planned) == set()
    assert (experiment / "evaluation/vipo-s0/scores.parquet").is_file()


def test_what_was_finished_without_the_workflow_is_asked_for_once_its_configuration_is_another(
    experiment: Path,
) -> None:
    """A killed workflow's stage may live on, or be finished by hand: the workflow knows nothing of its end."""
    record = experiment / "runs/vipo-s0/provenance.json"
    same, other = (PlannedJob("train", "vipo-s0", "forced", True, json.dumps({"eta": eta})) for eta in (0.3, 0.5))
    assert _way(experiment, other) == set()
    record.write_text(json.dumps({"config": {"eta": 0.3}}))
    assert _way(experiment, same) == set()
    with pytest.raises(WouldReplace, match="runs: vipo-s0"):
        _way(experiment, other)
    assert "runs/vipo-s0/weights/a.safetensors" in _way(experiment, other, consent=True)


def test_report_and_crate_make_way_unasked(experiment: Path) -> None:
    shown = {"report/index.html", "report/time.csv"}
    crate = {"crate/Snakefile", "ro-crate-metadata.json", "ro-crate-metadata.json.sig"}
    assert _way(experiment, PlannedJob("report"), PlannedJob("crate")) == {*shown, *crate}
    # The page's numbers, which were not planned.
    assert (experiment / "report/data/report.json").is_file()
    assert _way(experiment, PlannedJob("summarize"), PlannedJob("crate")) == {"report/data/report.json"}


def test_nothing_moves_while_a_process_writes_one_of_them(experiment: Path) -> None:
    before = {path for path in experiment.rglob("*") if path.is_file()}
    planned = [PlannedJob("prepare"), PlannedJob("score", "vipo-s0")]
    with run_lock(experiment / "evaluation/vipo-s0"), pytest.raises(RunLocked, match="another process writes it"):
        _way(experiment, *planned, consent=True)
    assert before <= {path for path in experiment.rglob("*") if path.is_file()}
    assert not (experiment / ".superseded").exists()


def test_a_message_about_many_runs_is_short(experiment: Path) -> None:
    planned = [PlannedJob("score", f"arm{seed}-s0") for seed in range(200)]
    for job in planned:
        (experiment / job.folder).mkdir(parents=True)
        (experiment / job.folder / "scores.parquet").touch()
    with pytest.raises(WouldReplace, match=", and 194 more\n") as told:
        _way(experiment, *planned)
    assert len(str(told.value)) < 1000


def test_two_sets_of_one_moment_stay_apart(experiment: Path) -> None:
    first = set_aside(experiment, [experiment / "prompts"])
    (experiment / "prompts").mkdir()
    (experiment / "prompts/manifest.json").write_text("other")
    second = set_aside(experiment, [experiment / "prompts"])
    assert (first / "prompts/manifest.json").read_text() == "prompts/manifest.json"
    assert (second / "prompts/manifest.json").read_text() == "other"


def _evaluate(experiment: Path, steps: int, source: str = "weights") -> None:
    folder, root = experiment / "evaluation/vipo-s0", experiment.parents[1]
    read = root / "weights"
    read.write_text(source)
    with record_stage("score", folder, inputs=[read], outputs=[folder / "scores.parquet"],
                      config={"steps": steps}, root=root, experiment=experiment):  # fmt: skip
        folder.mkdir(exist_ok=True)
        (folder / "scores.parquet").write_text(f"{steps} {source}")


def test_a_stage_by_hand_sets_aside_what_another_configuration_or_input_made(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vipo.provenance.environment.code_folder", lambda: None)

    def sets() -> list[str]:
        return sorted(path.read_text() for path in experiment.glob(".superseded/*/evaluation/vipo-s0/scores.parquet"))

    # What has no record may be anything.
    _evaluate(experiment, 1)
    assert sets() == ["evaluation/vipo-s0/scores.parquet"]
    _evaluate(experiment, 1)
    assert len(sets()) == 1
    _evaluate(experiment, 2)
    _evaluate(experiment, 2, "other weights")
    assert sets() == ["1 weights", "2 weights", "evaluation/vipo-s0/scores.parquet"]
    aside = next(experiment.glob(".superseded/*/evaluation/vipo-s0/provenance.json")).parent
    assert (aside / "provenance.json").is_file()


def test_a_stage_that_fails_before_it_writes_leaves_the_record(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vipo.provenance.environment.code_folder", lambda: None)
    folder, root = experiment / "report/data", experiment.parents[1]

    def summarize(text: str | None) -> None:
        with record_stage("summarize", folder, inputs=[], outputs=[folder / "report.json"], config={}, root=root):
            if text is not None:
                (folder / "report.json").write_text(text)
            if text != "finished":
                raise OSError("the disk is full")

    summarize("finished")
    record = (folder / "provenance.json").read_bytes()
    with pytest.raises(OSError, match="full"):
        summarize(None)
    assert (folder / "provenance.json").read_bytes() == record
    with pytest.raises(OSError, match="full"):
        summarize("other bytes")
    assert not (folder / "provenance.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["report.json"]
