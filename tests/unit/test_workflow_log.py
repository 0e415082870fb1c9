"""The workflow's log: a line a job, bars with reward and time left, errors once and last, then how to go on."""

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vipo.standing import Standing, read_error, read_standing
from vipo.tracking.progress import progress_bar
from vipo.workflow_log import WorkflowLog

AGAIN = "make demo"
# Where the handler in whose place the log is comes from, as Snakemake's own messages do.
LIBRARY = str(Path(logging.__file__).parent / "x.py")


class Terminal:
    """A workflow log over a stream that is no terminal, with a clock that stands until it is moved."""

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.folder, self.seconds = folder, 0.0
        self.stream = io.StringIO()
        self.log = WorkflowLog(logging.StreamHandler(self.stream), AGAIN, quiet, lambda: self.seconds)

    def say(self, event: str | None, message: str = "", level: int = logging.INFO, **told: Any) -> None:
        record = logging.LogRecord("snakemake.logging", level, told.pop("path", __file__), 1, message, None, None)
        vars(record).update(told | ({"event": event} if event else {}))
        self.log.handle(record)

    def begin(self, **jobs: int) -> None:
        self.say("workflow_started")
        self.say("run_info", stats=jobs | {"all": 1, "total": sum(jobs.values()) + 1})

    def start(self, number: int, rule: str, run: str = "", log: str = "") -> Path:
        path = self.folder / f"{number}.log"
        path.write_text(log)
        wildcards = {"run": run} if run else {}
        self.say("job_info", jobid=number, rule_name=rule, wildcards=wildcards, log=[str(path)])
        return path

    def fail(self, number: int, rule: str) -> None:
        self.say(
            "error", 'RuleException:\nCalledProcessError in file "/x", line 3:\nCommand', exception="RuleException"
        )
        self.say("job_error", level=logging.ERROR, jobid=number, rule_name=rule, rule_msg=None)

    def finish(self, number: int) -> None:
        self.say("job_finished", job_id=number)

    def end(self) -> list[str]:
        self.log.close()
        self.log.close()
        return self.stream.getvalue().splitlines()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path)
    yield made
    made.log.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _bar(monkeypatch: pytest.MonkeyPatch, done: int, total: int, reward: str = "", **rest: str) -> str:
    """What a stage's own progress bar writes into its log."""
    stream = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        with progress_bar(total=total, description="grpo-s0", unit="update") as bar:
            if reward:
                bar.set_postfix({"reward": reward}, ratio="1e-7", **rest, refresh=False)
            bar.update(done)
            bar.refresh()
    return stream.getvalue()


def test_a_line_a_job_with_reward_and_time_left(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.begin(prepare=1, train=3, evaluate=3)
    terminal.start(1, "prepare")
    terminal.seconds = 4
    terminal.finish(1)
    terminal.start(2, "train", "grpo-s0", _bar(monkeypatch, 10, 30, "0.205 -> 0.351"))
    terminal.start(3, "evaluate", "base-s0", _bar(monkeypatch, 40, 80))
    terminal.seconds = 64
    assert terminal.log._standings() == [
        "  train grpo-s0        [#######.............] 10/30  00:00 left  reward 0.205 -> 0.351",
        "  evaluate base-s0     [##########..........] 40/80  00:00 left",
        # 120 and 60 seconds of these, two more of 180 and of 120 seconds, two at a time.
        "  1 of 7 jobs done, about 6 minutes left",
    ]
    (terminal.folder / "2.log").write_text(_bar(monkeypatch, 30, 30, "0.205 -> 0.797"))
    terminal.seconds = 184
    terminal.finish(2)
    lines = terminal.end()
    assert lines[0] == "[1/7] prepare: 4 s"
    assert lines[1].startswith("[2/7] train grpo-s0: 3 min 0 s, reward 0.205 -> 0.797, about ")
    assert lines[2:] == ["2 jobs done in 3 min 4 s"]


def test_a_stages_error_stands_once_and_last(terminal: Terminal) -> None:
    terminal.begin(train=2, evaluate=1)
    for number, run in ((1, "grpo-s0"), (2, "vipo-s0")):
        terminal.start(number, "train", run, "INFO: x\nerror: reward 'judge' raised \x1b[2J\nand more\n")
    terminal.seconds = 30
    terminal.fail(1, "train")
    terminal.fail(2, "train")
    terminal.say("error", "WorkflowError:\nAt least one job did not complete successfully.", exception="WorkflowError")
    terminal.say(None, "Exiting because a job execution failed. Look above", level=logging.ERROR, path=LIBRARY)
    lines = terminal.end()
    assert lines == [
        "train grpo-s0 failed after 30 s",
        "train vipo-s0 failed after 30 s",
        f"train grpo-s0, train vipo-s0 failed; log: {terminal.folder}/1.log {terminal.folder}/2.log",
        "error: reward 'judge' raised \N{REPLACEMENT CHARACTER}[2J",
        "and more",
        "to go on: mend that, then make demo (finished jobs stay, training goes on from its newest checkpoint)",
    ]


def test_a_job_that_was_tried_again_is_no_error(terminal: Terminal) -> None:
    terminal.begin(train=1)
    terminal.start(1, "train", "grpo-s0")
    terminal.fail(1, "train")
    terminal.start(1, "train", "grpo-s0")
    terminal.finish(1)
    assert terminal.end()[-1] == "1 jobs done in 0 s"


def test_what_stops_before_any_job(terminal: Terminal) -> None:
    text = 'WorkflowError in file "/x", line 4:\nexperiment demo: training.x: unknown\n  File "/x", line 4, in <module>'
    terminal.say("error", text, level=logging.ERROR, exception="WorkflowError")
    assert terminal.end() == [
        "error: experiment demo: training.x: unknown",
        "to go on: mend that, then make demo (nothing was started)",
    ]


def test_what_others_named_steers_no_terminal(terminal: Terminal) -> None:
    text = 'WorkflowError in file "/x", line 4:\nprompts: changed since: a\x1b[2J\u202e.json'
    terminal.say("error", text, level=logging.ERROR, exception="WorkflowError")
    assert terminal.end()[0] == "error: prompts: changed since: a\\x1b[2J\\u202e.json"


def test_jobs_of_one_rule_are_told_apart(terminal: Terminal) -> None:
    terminal.begin(credit=1, score_share=1)
    for number, wildcards in enumerate(({"checkpoint": "grpo-s0-u12"}, {"run": "vipo-s0", "share": "2"})):
        rule = ("credit", "score_share")[number]
        terminal.say(
            "job_info", jobid=number, rule_name=rule, wildcards=wildcards, log=[str(terminal.folder / "x.log")]
        )
        terminal.finish(number)
    shown = terminal.end()
    assert shown[0].startswith("[1/2] credit grpo-s0-u12: ")
    assert shown[1].startswith("[2/2] score_share vipo-s0 2: ")


def test_the_lock_of_a_killed_snakemake(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/snakemake", "--profile", "local", "--config", "overrides=[a=1, b=2]"])
    text = "LockException:\nError: Directory cannot be locked. Please"
    terminal.say("error", text, level=logging.ERROR, exception="LockException")
    error, how = terminal.end()
    assert error == "error: Directory cannot be locked. Please"
    assert how.endswith(", snakemake --unlock --profile local --config 'overrides=[a=1, b=2]'; then make demo")


def test_what_make_started_is_unlocked_without_its_path(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / ".venv/bin/snakemake"), "--profile", "local"])
    monkeypatch.setenv("VIPO_AGAIN", AGAIN)
    terminal.say("error", "LockException:\nError: locked", level=logging.ERROR, exception="LockException")
    assert terminal.end()[-1].endswith(", .venv/bin/snakemake --unlock --profile local; then make demo")


def test_an_error_that_says_how_to_go_on_has_the_last_word(terminal: Terminal) -> None:
    terminal.begin(train=1)
    how = "to go on under this name: make demo SET_ASIDE=true"
    told = f"results/demo: finished results would be replaced:\n  runs: grpo-s0\n{how}"
    terminal.say("error", told, level=logging.ERROR, exception="WorkflowError")
    assert terminal.end()[-1] == how


def test_interrupts(terminal: Terminal) -> None:
    terminal.begin(train=1)
    terminal.start(1, "train", "grpo-s0", "Traceback\nKeyboardInterrupt\n")
    # Snakemake's from its first job on.
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    terminal.say(None, "Terminating processes on user request, this might take some time.", path=LIBRARY)
    terminal.fail(1, "train")
    first, last = terminal.end()
    assert first == "stopped on request"
    assert last.startswith("to go on: make demo (")


def test_a_workflow_that_is_asked_to_stop_does_not_end_as_if_it_were_done(terminal: Terminal) -> None:
    terminal.begin(train=2)
    terminal.start(1, "train", "grpo-s0")
    for _ in range(2):
        terminal.say(None, "Will exit after finishing currently running jobs (scheduler).", path=LIBRARY)
    terminal.finish(1)
    first, done, stopped, last = terminal.end()
    assert first.startswith("asked to stop: no other job starts")
    assert done.startswith("[1/2] train grpo-s0: ")
    assert stopped == "stopped on request"
    assert last.startswith("to go on: make demo (finished jobs stay")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_the_workflow_is_read_is_two_lines(terminal: Terminal, number: int, status: int) -> None:
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    assert ended.value.code == status
    assert terminal.end() == [
        "", "stopped while the workflow was being read; nothing was started", "to go on: make demo"
    ]  # fmt: skip


def test_others_messages_are_shown_and_snakemakes_own_are_not(terminal: Terminal) -> None:
    terminal.begin(train=1)
    terminal.say(None, "Select jobs to execute...", path=LIBRARY)
    terminal.say(None, "a warning", level=logging.WARNING, path=LIBRARY)
    terminal.say(None, "Slurm job 7 was pre-empted and is queued again.")
    assert terminal.stream.getvalue().splitlines() == ["a warning", "Slurm job 7 was pre-empted and is queued again."]


@pytest.mark.parametrize("begun", [True, False], ids=["while jobs run", "before any"])
def test_a_terminal_that_is_closed_stops_no_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    reader, tty = os.openpty()
    # Unbuffered: what cannot be written is not tried again by closing.
    with io.TextIOWrapper(io.FileIO(tty, "w"), write_through=True) as stream:
        terminal = Terminal(tmp_path)
        terminal.log.close()
        terminal.log = WorkflowLog(logging.StreamHandler(stream), AGAIN, False, lambda: terminal.seconds)
        terminal.begin(train=2)
        if begun:
            terminal.start(1, "train", "grpo-s0")
            assert terminal.log._drawn
        os.close(reader)
        terminal.start(2, "train", "vipo-s0")
        terminal.finish(2)
        terminal.log.close()
        assert not terminal.log._terminal


def test_a_dry_run_stays_snakemakes(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, quiet=True)
    terminal.begin(train=1)
    terminal.say("job_info", "rule train:", jobid=1, rule_name="train", wildcards={}, log=["x"])
    assert [line for line in terminal.end() if line] == ["rule train:"]


def test_a_log_without_bars_or_errors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert (read_standing(log), read_error(log)) == (None, "")
    log.write_text("\n".join(f"line {number}" for number in range(40)))
    assert read_standing(log) is None
    assert read_error(log).splitlines() == [f"line {number}" for number in range(25, 40)]
    log.write_text("x: 0%| | 0/4 [00:00<?, ?update/s]\nx: 50%|## | 2/4 [00:10<00:10,  5.00s/update, reward=0.1 -> 0.2]")
    assert read_standing(log) == Standing(2, 4, "00:10", "0.1 -> 0.2")


def test_a_bar_that_is_wider_than_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text(_bar(monkeypatch, 1500, 3000, "-10.655 -> -12.582", grad="1" * 40))
    standing = read_standing(tmp_path / "log")
    assert standing is not None
    assert (standing.done, standing.total, standing.reward) == (1500, 3000, "-10.655 -> -12.582")
