"""What the workflow makes of the states of Slurm jobs, against a squeue and a scontrol of its own."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as executor

from vipo.config.compose import repository_root

RULES = repository_root() / "workflow" / "rules" / "slurm.smk"


def polled(states: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path, squeue: str) -> list[Any]:
    """States after two polls, of which the first one is Slurm's own answer, and the jobs that were requeued."""

    async def query(command: str, logger: logging.Logger) -> tuple[dict[str, str], float]:
        return dict(states), 0.1

    for name, text in (("squeue", squeue), ("scontrol", f'echo "$2" >> {folder}/requeued')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
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
