"""The steps of the script for a GPU: their order and time, and whatever ends one leaves its figures."""

import itertools
import json
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from families import FAMILIES

from benchmarks.gpu import gpu, supervise
from benchmarks.gpu.families import share_of_families
from benchmarks.gpu.options import OPTIONS
from benchmarks.gpu.sizes import REAL
from benchmarks.gpu.steps import BUDGET, STEPS, Step


def test_what_is_worth_most_has_its_time_even_where_every_step_reaches_its_limit() -> None:
    names = [step.name for step in STEPS]
    timed = [step for step in STEPS[: names.index("sd3_options") + 1] if step.timed]
    beside = [step for step in STEPS if not step.timed]
    assert [step.name for step in timed] == ["machine", "sd3_window", "flux", "wan", "sd3_options"]
    assert sum(step.limit for step in timed) + max(step.limit for step in beside) <= BUDGET
    assert beside == list(STEPS[1 : 1 + len(beside)])
    # Sixteen cores start all of them at once, and every family is in one of them.
    assert len(beside) <= 16 * 2 // 3
    own = [int(step.name.removeprefix("families_")) for step in beside if step.name.startswith("families_")]
    shares = [share_of_families(part, len(own)) for part in own]
    assert sorted(itertools.chain(*shares)) == sorted(FAMILIES)
    assert list(REAL) == [name for name in names if name in REAL]
    cases = OPTIONS["sd3_options"][1]
    assert next(iter(cases.values())) == ("training.gradient_checkpointing=false",)


def test_without_git_the_commit_is_told_or_why_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VIPO_GIT_COMMIT", raising=False)
    facts = gpu.machine_facts()
    assert facts["commit"] is None
    assert "git" in facts["commit_unknown"]
    assert "nvidia-smi" in facts["gpus"]
    monkeypatch.setenv("VIPO_GIT_COMMIT", "0123abcd")
    facts = gpu.machine_facts()
    assert facts["commit"] == "0123abcd"
    assert "commit_unknown" not in facts


def _stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Steps are `script`, which finds the folder of the results in $3 and the step's name in $5."""
    path = folder / "stand-in"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(gpu, "sys", SimpleNamespace(executable=str(path)))


def test_what_a_step_noted_stays_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted, output = tmp_path / "machine.jsonl", tmp_path / "output"
    output.mkdir()
    (output / "gpu.json").write_text("of an earlier run")
    steps = (Step("machine", 0.2, "ended by its limit"), Step("flux", 60, "no time"))
    monkeypatch.setattr(gpu, "STEPS", steps)
    # A step that does not end by itself, and clocks that go on by a quarter of a second whenever they are looked at; it
    # is looked at once it has noted something.
    half = '{"key": "first", "value": 1.5}\\n{"key": "half of a li'
    _stand_in(monkeypatch, tmp_path, f"printf '{half}' > $3/new; mv $3/new $3/$5.jsonl; exec sleep 3600")
    for module in (gpu, supervise):
        ticks = itertools.count()
        clock = SimpleNamespace(monotonic=lambda ticks=ticks: next(ticks) / 4, sleep=lambda _: _there(noted))
        monkeypatch.setattr(module, "time", clock)
    results = gpu.run(output, tmp_path, "cpu", True, 5.5, ["machine", "flux"])
    assert results["steps"]["machine"]["status"].startswith("ended by its limit")
    assert results["steps"]["machine"]["figures"] == {"first": 1.5}
    assert "used up" in results["not_run"]["flux"]
    assert json.loads((output / "gpu.json").read_text()) == results
    assert "| machine | first | 1.5 |" in (output / "gpu.md").read_text()
    # What is lent a machine may be given few files back.
    assert sorted(path.name for path in output.iterdir()) == ["gpu.json", "gpu.md", "logs.tar.gz"]
    with tarfile.open(output / "logs.tar.gz") as archive:
        assert {"./machine.jsonl", "./machine.log"} <= set(archive.getnames())


@pytest.mark.parametrize(("budget", "limit"), [(BUDGET / 2, 60), (BUDGET * 10, 600)])
def test_a_longer_budget_lengthens_a_step_s_limit(
    budget: float, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    class Noted(supervise.Running):
        def __init__(self, step: Step, command: Sequence[str], folder: Path, seconds: float) -> None:
            limits.append(seconds)
            super().__init__(step, command, folder, seconds)

    monkeypatch.setattr(gpu, "STEPS", (Step("machine", 60, ""),))
    monkeypatch.setattr(gpu, "Running", Noted)
    _stand_in(monkeypatch, tmp_path, "exit 0")
    gpu.run(tmp_path / "output", tmp_path, "cuda", True, budget, ["machine"])
    assert limits == [limit]


def test_whoever_stops_the_whole_finds_what_was_noted_and_no_step_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STEPS", (Step("machine", 60, ""), Step("flux", 60, "")))
    figure, noted = '{"key": "|first|", "value": 1.5}', tmp_path / "machine.jsonl"
    _stand_in(
        monkeypatch, tmp_path, f"echo $$ > $3/pid; echo '{figure}' > $3/new; mv $3/new $3/$5.jsonl; exec sleep 3600"
    )

    output, looked = tmp_path / "output", itertools.count()

    def interrupted(_: float) -> None:
        if not next(looked):
            _there(noted)
            return
        # Who kills it now, so that it can do nothing more, finds this.
        found = json.loads((output / "gpu.json").read_text())["steps"]["machine"]
        assert (found["status"], found["figures"]) == ("under way", {"|first|": 1.5})
        raise KeyboardInterrupt

    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupted))
    monkeypatch.setattr(supervise, "_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(output, tmp_path, "cpu", True, 300, ["machine", "flux"])
    told = json.loads((output / "gpu.json").read_text())
    assert {name: (step["status"], step["figures"]) for name, step in told["steps"].items()} == {
        "machine": ("stopped with the whole", {"|first|": 1.5})
    }
    assert told["not_run"]["flux"] == "the whole ended before it"
    assert "machine" not in told["not_run"]
    assert r"| machine | \|first\| | 1.5 |" in (output / "gpu.md").read_text()
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def _there(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.is_file():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_steps_that_measure_no_time_run_beside_each_other_and_one_that_fails_stops_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untimed = [Step(name, 60, "", timed=False) for name in ("waits", "bytes")]
    monkeypatch.setattr(gpu, "STEPS", (Step("machine", 60, ""), *untimed, Step("flux", 60, "")))
    monkeypatch.setattr(gpu, "_at_once", lambda: 2)
    # The first of the two ends when the second one has begun.
    waits = "until [ -e $3/begun ]; do sleep 0.01; done"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads = "echo $OMP_NUM_THREADS > $3/$5.threads"
    cases = f"case $5 in machine) echo why; exit 3;; bytes) touch $3/begun;; waits) {waits};; esac"
    _stand_in(monkeypatch, tmp_path, f"{threads}; {cases}")
    results = gpu.run(tmp_path / "output", tmp_path, "cpu", True, 300, ["machine", "waits", "bytes", "flux"])
    # Those beside each other have a thread each.
    found = {name: (tmp_path / f"{name}.threads").read_text().strip() for name in results["steps"]}
    assert found == {"machine": "7", "waits": "1", "bytes": "1", "flux": "7"}
    told = {name: step["status"] for name, step in results["steps"].items()}
    assert told == {"machine": "failed with status 3", "waits": "ok", "bytes": "ok", "flux": "ok"}
    assert results["steps"]["machine"]["last_lines"] == ["why"]
