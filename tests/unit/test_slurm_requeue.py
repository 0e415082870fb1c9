"""What the workflow makes of Slurm jobs and of their states, against a squeue and a scontrol of its own."""

import asyncio
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as executor
from snakemake.exceptions import WorkflowError

from vipo.config.compose import repository_root

RULES = repository_root() / "workflow" / "rules" / "slurm.smk"


# As Snakemake writes it; `{files}` is a list's file where there are more than twenty.
SCRIPT = """#!/bin/sh
python -m snakemake --snakefile '/x/Snakefile' --target-jobs 'train:run=grpo-s0' --wait-for-files{files} \
  --config {given} --mode 'remote'
"""


def _programs(monkeypatch: pytest.MonkeyPatch, folder: Path, **programs: str) -> None:
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def polled(states: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path, squeue: str) -> list[Any]:
    """States after two polls, of which the first one is Slurm's own answer, and the jobs that were requeued."""

    async def query(command: str, logger: logging.Logger) -> tuple[dict[str, str], float]:
        return dict(states), 0.1

    _programs(monkeypatch, folder, squeue=squeue, scontrol=f'echo "$2" >> {folder}/requeued')
    monkeypatch.setattr(executor, "query_job_status", query)
    own: dict[str, Any] = {}
    exec(RULES.read_text(), own)
    own["requeue_preempted_jobs"]()
    found = [asyncio.run(executor.query_job_status("sacct", logging.getLogger()))[0] for _ in range(2)]
    requeued = folder / "requeued"
    return [*found, requeued.read_text().split() if requeued.exists() else []]


def test_what_slurm_has_forgotten_has_failed_and_what_it_was_cancelled_by_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"17": "PREEMPTED", "18": "FAILED", "19": "CANCELLED by 1000", "20": "RUNNING"}
    wanted = {"17": "FAILED", "18": "FAILED", "19": "CANCELLED", "20": "RUNNING"}
    for squeue in ("exit 0", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"):
        assert polled(states, monkeypatch, tmp_path, squeue) == [wanted, wanted, []]


def test_a_controller_that_does_not_answer_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"17": "PREEMPTED", "18": "FAILED"}
    assert polled(states, monkeypatch, tmp_path, "exit 1") == [states, states, []]


def test_what_the_controller_says_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pre-empted; failed by itself; queued again by Slurm already, which the database does not know yet.
    lines = "17 PREEMPTED 2026-01-01T00:00:00\\n18 FAILED N/A\\n19 PENDING 2026-01-01T00:00:00\\n"
    # Only what is asked for.
    squeue = f"printf '{lines}' | grep -E \"$(printf '%s' \"$*\" | sed 's/.*--jobs=\\([0-9,]*\\).*/\\1/; s/,/|/g')\""
    first, _, requeued = polled({"17": "PREEMPTED", "18": "FAILED", "19": "FAILED"}, monkeypatch, tmp_path, squeue)
    assert first == {"17": "PENDING", "18": "FAILED", "19": "PENDING"}
    assert set(requeued) == {"17"}


@pytest.mark.parametrize("listed", [False, True], ids=["files named", "a list's file named"])
@pytest.mark.parametrize(
    ("experiment", "name", "ours"),
    [
        ("demo", "demo", ["renamed-to-demo", "demo"]),
        ("demo", "fresh", ["demo-renamed"]),
        # Another experiment's name begins alike.
        ("credit", "credit", ["credit"]),
        ("credit_clip", "credit_clip", ["credit_clip"]),
    ],
)
def test_jobs_left_behind_are_those_of_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool, experiment: str, name: str, ours: list[str]
) -> None:
    jobs = {
        "demo": ("demo", "'experiment=demo'"),
        "demo-renamed": ("fresh", "'experiment=demo' 'overrides=[sampling.eta=0.5,experiment.name=fresh]'"),
        "renamed-to-demo": ("demo", "'overrides=[experiment.name=demo]' 'experiment=credit'"),
        "credit": ("credit", "'experiment=credit'"),
        "credit_clip": ("credit_clip", "'experiment=credit_clip'"),
    }
    for job, (folder, given) in jobs.items():
        files = "-file '/x/.snakemake/tmp.1/list.txt'" if listed else f" '/x' 'results/{folder}/configs/base-s0.yaml'"
        (tmp_path / f"{job}.sh").write_text(SCRIPT.format(files=files, given=given))
    lines = "\n".join(f"{job}|{tmp_path}|rule_train" for job in jobs)
    lines += f"\nunreadable|{tmp_path}|rule_train\nof-another-checkout|/|rule_train\nno-rule|{tmp_path}|x"
    _programs(monkeypatch, tmp_path, squeue=f"echo '{lines}'", scontrol=f'cat "{tmp_path}/$3.sh"')
    monkeypatch.chdir(tmp_path)
    own: dict[str, Any] = {"Path": Path, "EXPERIMENT": experiment, "EXPERIMENT_DIR": f"results/{name}"}
    exec(RULES.read_text(), own)
    assert sorted(own["jobs_left_behind"]()) == sorted([*ours, "unreadable"])


def test_a_python_that_no_job_could_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = SimpleNamespace(executor_plugin=SimpleNamespace(name="slurm"))
    own: dict[str, Any] = {"workflow": workflow, "WorkflowError": WorkflowError, "OVERRIDES": []}
    exec(RULES.read_text(), own)
    monkeypatch.setattr(sys, "executable", "/my checkout/.venv/bin/python")
    with pytest.raises(WorkflowError, match="its path holds a space"):
        own["check_cluster"]()
