"""The launcher: where the ranks of several nodes meet, and how they end together."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from waits import SECONDS, eventually

import vipo
from vipo.config.compose import repository_root
from vipo.config.training import DistributionConfig
from vipo.errors import Preempted
from vipo.training.errors import TrainingError
from vipo.training.launch import OtherNodes, _wait, launch, rendezvous

ROOT = str(repository_root())
TWO = DistributionConfig(processes=2)


def _program(text: str) -> list[str]:
    return [sys.executable, "-c", "import os, sys, time, signal\nrank = int(os.environ['RANK'])\n" + text]


def test_one_node_needs_nothing() -> None:
    found = rendezvous(TWO, {"SLURM_NODEID": "3"})
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert found["NODE_RANK"] == "0"
    assert 0 < int(found["MASTER_PORT"]) < 65536


def test_ranks_run_the_launchers_code_and_know_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a working directory that holds another vipo."""
    (tmp_path / "vipo").mkdir()
    (tmp_path / "vipo" / "__init__.py").write_text("raise SystemExit('another vipo')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/vipo", "train", "seed=3"])
    (tmp_path / "rank.py").write_text(
        "import os, vipo\n"
        "from vipo.provenance.lineage import command_line\n"
        "print(vipo.__file__, command_line(), file=open('rank' + os.environ['RANK'], 'w'))\n"
    )
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    launch([sys.executable, "-P", "-m", "rank"], TWO)
    told = f"{Path(vipo.__file__)} ['vipo', 'train', 'seed=3']\n"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == [told, told]


def test_nodes_meet_on_the_first_one_of_the_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    slurm = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_ID": "123457"}
    config = DistributionConfig(processes=2, nodes=2)
    assert rendezvous(config, slurm) == {"MASTER_ADDR": "node3", "MASTER_PORT": "23457", "NODE_RANK": "1"}
    assert rendezvous(config, slurm | {"MASTER_PORT": "7"})["MASTER_PORT"] == "7"
    with pytest.raises(TrainingError, match=r"distribution.nodes is 3, but this Slurm step has 2 nodes"):
        rendezvous(DistributionConfig(nodes=3), slurm)
    # A step may have fewer nodes than its job.
    with pytest.raises(TrainingError, match="this Slurm step has 1 nodes; start it with srun --nodes=2"):
        rendezvous(config, slurm | {"SLURM_STEP_NUM_NODES": "1"})
    larger = slurm | {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[1-4]"}
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_STEP_NUM_TASKS": "2"}
    assert rendezvous(config, larger | step | {"SLURM_LOCALID": "0"})["MASTER_ADDR"] == "node3"


def test_several_tasks_on_a_node_are_refused_by_each_of_them() -> None:
    slurm = {"SLURM_NODEID": "0", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_ID": "1"}
    for tasks in ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "0"}, {"SLURM_LOCALID": "7"}):
        with pytest.raises(TrainingError, match=r"several tasks on a node .* srun --nodes=2 --ntasks-per-node=1"):
            rendezvous(DistributionConfig(nodes=2), slurm | tasks)


def test_without_slurm_the_variables_say_it() -> None:
    config = DistributionConfig(nodes=2)
    given = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "1", "OTHER": "x"}
    assert rendezvous(config, given) == {name: given[name] for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")}
    del given["MASTER_PORT"]
    with pytest.raises(TrainingError, match="MASTER_PORT are not set"):
        rendezvous(config, given)


def test_ranks_know_their_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch(_program(f"open(r'{tmp_path}/' + str(rank), 'w').write(' '.join(os.environ[n] for n in {names}))"), TWO, 3)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2 2 3", "1 1 2 2 3"]
    # What the user says of the libraries' threads holds.
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    # In one write each: an unfinished line of rank 0 is passed on as it is, like a progress bar.
    launch(_program(r"os.write(2, os.environ['OMP_NUM_THREADS'].encode() + b'\n')"), TWO, 3)
    assert sorted(capfd.readouterr().err.splitlines()) == ["5", "[rank 1] 5"]


def test_the_rank_that_dies_is_shown_first_and_ends_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 notices the death at once, as a broken collective would make it, and says so."""
    text = f"""
gone = r"{tmp_path}/gone"
if rank == 1:
    os.write(2, b"my own trouble\\n")
    open(gone, "w").close()
    os._exit(3)
while not os.path.exists(gone):
    time.sleep(0.001)
os.write(2, b"where is rank 1?\\n")
time.sleep(600)
open(r"{tmp_path}/outlived", "w").close()
"""
    with pytest.raises(TrainingError, match=r"rank 1 \(process \d+ on .*\) ended with status 3; the other ranks"):
        launch(_program(text), TWO)
    assert not (tmp_path / "outlived").exists()
    shown = capfd.readouterr().err
    assert shown.startswith("[rank 1] my own trouble\n")


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("train", "train.memory_mb, or set distribution.strategy=fsdp; the other ranks were stopped. The newest"),
        ("evaluate", "evaluate.memory_mb, or lower distribution.processes; the other ranks were stopped. What is"),
    ],
)
def test_a_rank_that_is_killed_is_told_with_what_its_stage_reads(stage: str, told: str) -> None:
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    ended.put((0, -signal.SIGKILL))
    ranks: Any = {0: SimpleNamespace(pid=7)}
    with pytest.raises(TrainingError, match=rf"by SIGKILL, often by a memory limit: raise cluster\.{re.escape(told)}"):
        _wait(ranks, queue.Queue(), ended, 0, [], OtherNodes({}, TWO), stage)


def test_no_rank_is_left_when_the_launcher_ends(tmp_path: Path) -> None:
    """Neither alive nor unreaped: what it held, such as the run's lock, is free for the next start."""
    other = tmp_path / "0"
    text = f"""
held = bytearray(256 * 2**20) if rank == 0 else b""
rank == 0 and open(r"{other}.new", "w").write(str(os.getpid())) and os.rename(r"{other}.new", r"{other}")
while not os.path.exists(r"{other}"):
    time.sleep(0.001)
time.sleep(600) if rank == 0 else os._exit(3)
"""
    with pytest.raises(TrainingError, match=r"rank 1 .* ended with status 3"):
        launch(_program(text), TWO)
    assert not psutil.pid_exists(int(other.read_text()))


def test_a_signal_reaches_every_rank_and_their_status_comes_back(tmp_path: Path) -> None:
    listening = [tmp_path / rank for rank in "01"]
    text = f"""
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
open(r"{tmp_path}/" + str(rank), "w").close()
time.sleep(600)
"""

    def ask() -> None:
        eventually("both ranks listen", lambda: all(path.exists() for path in listening))
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Preempted, match="all ranks have stopped"):
        launch(_program(text), TWO)
    # Ranks that are still loading have no handler: the signal ends them, and nothing was lost.
    for path in listening:
        path.unlink()
    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Preempted, match="all ranks have stopped"):
        launch(_program(text.replace("signal.signal(", "(lambda *_: None)(")), TWO)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("status", [75, -signal.SIGTERM])
def test_one_rank_that_is_asked_stops_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The signal comes while it loads; rank 0 waits for it in a call that lets no handler run, rank 2 dies of it."""
    # How long rank 0 is waited for: until rank 2 has been asked, however long that takes.
    monkeypatch.setattr("vipo.training.launch._GRACE", SECONDS)

    def shorten() -> None:
        eventually("rank 2 was asked", (tmp_path / "asked").exists)
        monkeypatch.setattr("vipo.training.launch._GRACE", 2)

    end = f"os._exit({status})" if status > 0 else f"os.kill(os.getpid(), {-status})"
    text = f"""
asked = r"{tmp_path}/asked"
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM] if rank == 0 else [])
def lost(*_):
    os.write(2, b"lost a partner\\n")
    open(asked, "w").close()
    os._exit(1)
if rank == 2:
    signal.signal(signal.SIGTERM, lost)
    open(r"{tmp_path}/ready", "w").close()
while rank == 1 and not os.path.exists(r"{tmp_path}/ready"):
    time.sleep(0.001)
if rank == 1:
    {end}
time.sleep(600)
open(r"{tmp_path}/outlived", "w").close()
"""
    threading.Thread(target=shorten, daemon=True).start()
    with pytest.raises(Preempted, match="all ranks have stopped"):
        launch(_program(text), DistributionConfig(processes=3))
    assert not (tmp_path / "outlived").exists()
    assert "[rank 2] lost a partner" in capfd.readouterr().err


def test_deaths_after_a_signal_are_no_failure_if_a_rank_has_stopped(tmp_path: Path) -> None:
    """The one that has not come that far dies first; where none stops, as on a full disk, it is a failure."""
    text = f"""
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(rank), os._exit(75 if rank else 1)))
ready = r"{tmp_path}/ready"
rank == 1 and open(ready, "w").close()
while rank == 0 and not os.path.exists(ready):
    time.sleep(0.001)
rank == 0 and (os.unlink(ready), os.kill({os.getpid()}, signal.SIGTERM))
time.sleep(600)
"""
    with pytest.raises(Preempted, match="all ranks have stopped"):
        launch(_program(text), TWO)
    with pytest.raises(TrainingError, match=r"rank \d .* ended with status 1; the other ranks"):
        launch(_program(text.replace("75", "1")), TWO)


def test_a_signal_reaches_ranks_that_start_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedMeanwhile(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, env: dict[str, str], **options: Any) -> None:
            super().__init__(*args, env=env, **options)
            if env["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("vipo.training.launch.subprocess.Popen", AskedMeanwhile)
    # Each rank would end well by itself, if nobody told it.
    with pytest.raises(Preempted, match="all ranks have stopped"):
        launch(_program("signal.signal(signal.SIGUSR1, lambda *_: os._exit(75)); time.sleep(600)"), TWO)


@pytest.mark.parametrize(
    ("status", "told"),
    [(3, r"TrainingError: (rank 1 .*) ended with status 3; the other"), (75, r"(Preempted: all ranks have stopped)")],
)
def test_the_launcher_of_another_node_is_told_who_ended(status: int, told: str) -> None:
    """Two nodes here: what the ranks meet in is real; rank 0 would go on for ten minutes."""
    command = _program(f"""
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, rank == 0, timedelta(seconds={SECONDS}), False)
time.sleep(600) if rank == 0 else sys.exit({status})
""")
    launcher = f"""
import vipo.training.launch as room
from vipo.config.training import DistributionConfig
# This one loads what reaches the other while its rank does, and must not end before.
room._CONNECT = {SECONDS}
room.launch({command!r}, DistributionConfig(nodes=2))
"""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": rendezvous(TWO, {})["MASTER_PORT"]}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", launcher],
            env={**os.environ, **place, "NODE_RANK": str(node)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=SECONDS)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], said
    causes = [re.findall(told, text) for text in said]
    assert causes[0] == causes[1] != []


def test_what_was_told_first_stays_and_a_lost_store_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.training.launch._GRACE", 0.1)
    meeting = rendezvous(TWO, {})
    store = TCPStore("127.0.0.1", int(meeting["MASTER_PORT"]), None, True, timedelta(seconds=SECONDS), False)
    config = DistributionConfig(nodes=2)
    one, two = OtherNodes(meeting, config), OtherNodes(meeting, config)
    assert one.tell("rank 3 died") == "rank 3 died"
    assert two.tell("rank 0 lost its partner") == "rank 3 died"
    eventually("both have heard it", lambda: one.told == two.told == "rank 3 died")
    store.delete_key("vipo/ended")
    three = OtherNodes(meeting, config)
    assert three._connected.wait(SECONDS)
    assert three.told is None
    del store
    eventually("it hears that the store is gone", lambda: three.told is not None)
    assert str(three.told).startswith("rank 0, where the ranks meet on 127.0.0.1, is gone (")
    assert three.tell("rank 2 died") == "rank 2 died"


def test_of_ends_seen_together_a_killed_rank_is_the_cause() -> None:
    """The one that lost a partner may be seen first, where this process is held up meanwhile."""
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    for end in ((0, 1), (2, 1), (1, -signal.SIGKILL)):
        ended.put(end)
    ranks: Any = {rank: SimpleNamespace(pid=100 + rank) for rank in range(3)}
    with pytest.raises(TrainingError, match=r"^rank 1 \(process 101 .* was killed by SIGKILL"):
        _wait(ranks, queue.Queue(), ended, 0, [], OtherNodes({}, TWO), "train")


def test_one_node_has_nobody_to_tell() -> None:
    assert OtherNodes({}, TWO).tell("rank 1 died") == "rank 1 died"
