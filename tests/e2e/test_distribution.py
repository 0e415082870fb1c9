"""Several gloo processes: noise, advantages and gradients as of one, exact resume on any number of them, faults."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from nursery import Forked, Nurseries
from safetensors.torch import load_file
from waits import SECONDS, ended, eventually, gone

from vipo.config.compose import repository_root
from vipo.config.training import DistributionConfig
from vipo.provenance import read_provenance
from vipo.provenance.locks import run_lock
from vipo.training.checkpoints import list_checkpoints, load_checkpoint
from vipo.training.launch import rendezvous

ROOT = repository_root()
VIPO = str(Path(sys.executable).with_name("vipo"))
RUN = "demo/runs/vipo-s0"
# Another number than accelerate would take for two processes on this machine.
THREADS = (psutil.cpu_count(logical=False) or 1) // 2 + 1
# Seconds to wait for a partner, where one does not come: longer than a sound one may be held up by what else the
# machine does. All ranks that wait so are forks, which load in a second.
PARTNER = 10


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    """Four micro-batches in an optimizer step, so that four processes have one each."""
    return [*tiny_overrides, "arm=vipo", "training.updates=5", "training.group_size=8", "training.micro_batch=2"]


Ranks = Callable[..., list[list[int]]]


@pytest.fixture
def ranks(forks: Nurseries) -> Ranks:
    """``ranks(*jobs)`` runs jobs (see ranks.py) one after the other: the exit statuses of each one's ranks.

    `errors` takes standard error; `started` is of a process of its own that no variable tells how many threads it may
    have, as most users have it: training.threads decides.
    """
    script = str(Path(__file__).with_name("ranks.py"))

    def run(*jobs: dict[str, Any], errors: Path | None = None, started: bool = False) -> list[list[int]]:
        told = json.dumps(jobs, default=str)
        if started:
            environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            command = [sys.executable, script, told]
            finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            status, out, err = finished.returncode, finished.stdout, finished.stderr
        else:
            status, out, err = forks.run(script, told, cwd=ROOT)
        sys.stderr.write(err)
        assert status == 0
        if errors is not None:
            errors.write_text(err)
        return [json.loads(line) for line in out.splitlines()]

    return run


def _artifacts(results: Path) -> dict[str, bytes]:
    run = results / RUN
    files = [run / "metrics.jsonl", *run.glob("weights/**/*.*"), *run.glob("updates/**/*.*")]
    assert len(files) >= 3
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def _largest_difference(a: Path, b: Path) -> float:
    first, second = (
        {
            f"{file.relative_to(results)}/{name}": value
            for file in (results / RUN / "weights").rglob("*.safetensors")
            for name, value in load_file(file).items()
        }
        for results in (a, b)
    )
    assert first.keys() == second.keys()
    assert first
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="ratio-per-position"),
        pytest.param(
            # So that what is best and worst makes four micro-batches as well.
            ["arm=grpo", "objective.kl_weight=0.01", "training.best_of=4", "training.micro_batch=1"],
            id="kl-and-best-of",
        ),
        pytest.param(
            [
                *("training.lora={rank: 2, alpha: 4.0}", "objective.kl_weight=0.01"),
                *("training.gradient_checkpointing=true", "training.joined_transitions=2"),
                "sampling.window={size: 2, move: fixed, start: 1, shared_start: true}",
            ],
            id="lora-checkpointing-joined-and-shared",
        ),
    ],
)
def test_an_update_is_the_same_on_any_number_of_processes(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks, options: list[str]
) -> None:
    """Without options, half of the micro-batches have no gradient: of two processes both have one, of four two."""
    jobs: list[dict[str, Any]] = []
    # With the options, each number of processes and each strategy once.
    worlds = [(1, "ddp"), (2, "fsdp"), (4, "ddp")]
    if not options:
        worlds += [(2, "ddp"), (4, "fsdp")]
    threads = 1 if options else THREADS
    for world, strategy in worlds:
        results, parts = tmp_path / f"{world}{strategy}", tmp_path / f"{world}{strategy}.safetensors"
        chosen = [*overrides, *options, f"training.threads={threads}", f"distribution.strategy={strategy}"]
        jobs.append({"world": world, "results": results, "overrides": chosen, "parts": parts})
        if not options:
            jobs[-1]["alike"] = True
        shutil.copytree(prepared, results)
    assert ranks(*jobs, started=not options) == [[0] * world for world, _ in worlds]
    found = {job["parts"].stem: load_file(job["parts"]) for job in jobs}
    alone = found.pop("1ddp")
    assert float(alone["latents"].std()) > 0.5
    assert sum(name.startswith("gradient/1/") for name in alone) > 5
    assert float(alone["metric/group/zero_std_share"]) == (0 if options else 0.5)
    largest = max(float(value.abs().max()) for name, value in alone.items() if name.startswith("gradient/"))
    for parts in found.values():
        assert parts.keys() == alone.keys()
        assert parts["threads"] == threads
        assert (parts["latents"] == alone["latents"]).all()
        assert (parts["advantages"] == alone["advantages"]).all()
        for name, value in alone.items():
            if name.startswith("gradient/"):
                assert float((parts[name] - value).abs().max()) <= 1e-6 * largest, name
            elif name.startswith("metric/"):
                assert float(parts[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-7), name


def test_other_numbers_of_processes_reach_the_same_weights(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks
) -> None:
    """Four from the start; and two whose shards one process reads, whose whole tensors four read."""
    alone, four, moved = (shutil.copytree(prepared, tmp_path / name) for name in ("alone", "four", "moved"))
    chosen = [*overrides, "training.updates=8"]
    sharded = [*chosen, "distribution.strategy=fsdp"]
    assert ranks(
        {"world": 1, "results": alone, "overrides": chosen},
        {"world": 4, "results": four, "overrides": chosen},
        {"world": 2, "results": moved, "overrides": sharded, "stop_at": 2},
    ) == [[0], [0] * 4, [75, 75]]
    newest = list_checkpoints(moved / RUN / "checkpoints")[0]
    assert 2 <= int(newest.name) < 6
    pieces = {path.name for path in newest.glob("*.safetensors")}
    assert pieces == {f"tensors-0000{rank}-of-00002.safetensors" for rank in (0, 1)}
    assert ranks(
        {"world": 1, "results": moved, "overrides": sharded, "stop_at": int(newest.name) + 2},
        {"world": 4, "results": moved, "overrides": sharded},
    ) == [[75], [0] * 4]
    assert _largest_difference(alone, four) <= 1e-5
    assert _largest_difference(alone, moved) <= 1e-5
    lines = (moved / RUN / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(1, 9))


def _alone_two_and_moved(prepared: Path, folder: Path, ranks: Ranks, chosen: list[str]) -> list[Path]:
    """The results of one process, of two that are whole each, and of two in shards, which one process takes up."""
    alone, two, moved = found = [shutil.copytree(prepared, folder / name) for name in ("alone", "two", "moved")]
    sharded = [*chosen, "distribution.strategy=fsdp"]
    assert ranks(
        {"world": 1, "results": alone, "overrides": chosen},
        {"world": 2, "results": two, "overrides": chosen},
        {"world": 2, "results": moved, "overrides": sharded, "stop_at": 2},
        {"world": 1, "results": moved, "overrides": sharded},
    ) == [[0], [0] * 2, [75, 75], [0]]
    assert _largest_difference(alone, two) <= 1e-5
    assert _largest_difference(alone, moved) <= 1e-5
    return found


@pytest.mark.parametrize(
    "objective",
    ["{name: nft, old: {rate: 0.25, hold: 0.5}}", "{name: awm, anchor: {rate: 0.25, hold: 0.5}}"],
    ids=["nft", "awm"],
)
def test_kept_policies_are_the_same_on_any_number_of_processes(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks, objective: str
) -> None:
    chosen = [*overrides, "training.updates=4", f"objective={objective}"]
    found = _alone_two_and_moved(prepared, tmp_path, ranks, chosen)
    states = [load_checkpoint(results / RUN / "checkpoints/000004").tensors for results in found]
    kept = [name for name in states[0] if name.startswith("kept/")]
    assert len(kept) > 5
    for name in kept:
        for other in states[1:]:
            assert float((states[0][name] - other[name]).abs().max()) <= 1e-5, name


def test_a_step_of_one_length_is_the_same_on_any_number_of_processes(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks
) -> None:
    """And its rate, and the mean of the weights."""
    chosen = [*overrides, "training.updates=4", "optimizer=normalised", "optimizer.learning_rate=0.01"]
    chosen += ["optimizer.schedule=cosine", "optimizer.warmup_updates=1", "training.ema_decay=0.25"]
    *_, moved = _alone_two_and_moved(prepared, tmp_path, ranks, chosen)
    assert len(list((moved / RUN / "weights/ema").rglob("*.safetensors"))) == 1


# Of two, a sum has one order only; four have one micro-batch each.
@pytest.mark.parametrize(("strategy", "world"), [("ddp", 4), ("fsdp", 2)], ids=["ddp", "fsdp"])
def test_killed_processes_end_with_the_same_bytes(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks, strategy: str, world: int
) -> None:
    chosen, errors = [*overrides, f"distribution.strategy={strategy}"], tmp_path / "errors.txt"
    whole, disturbed = shutil.copytree(prepared, tmp_path / "whole"), shutil.copytree(prepared, tmp_path / "disturbed")
    job: dict[str, Any] = {"world": world, "overrides": chosen, "results": disturbed}
    found = ranks(job | {"results": whole}, job | {"kill_at": 3}, job, errors=errors)
    assert found == [[0] * world, [-9] * world, [0] * world]
    # Of gloo there may be a word, where a machine's own name cannot be looked up.
    assert "unused parameters" not in errors.read_text()
    assert _artifacts(whole) == _artifacts(disturbed)
    assert not list((disturbed / RUN).rglob("*.partial"))


ALIKE = """
import os, socket, torch
from vipo.config.training import DistributionConfig
from vipo.training.distribution import Distribution

def work():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(6)))
    names = [name for name, _ in network.named_parameters()]
    distribution = Distribution(DistributionConfig(processes=3), "cpu")
    policy = distribution.wrap(network, "fp32")
    assert distribution.unwrap(policy) is network
    assert [name for name, _ in network.named_parameters()] == names == list(network.state_dict())
    values, found = torch.randn(4, 32, generator=torch.Generator().manual_seed(distribution.rank)), []
    for _ in range(3):
        for last in (False, True):
            with distribution.gradients(policy, last):
                policy(values).square().mean().backward()
        found.append(torch.cat([value.grad.flatten() for value in network.parameters()]))
        network.zero_grad()
    print([int((other != found[0]).sum()) for other in found], flush=True)
    distribution.leave()

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
children = []
for rank in range(3):
    child = os.fork()
    if child == 0:
        os.environ |= {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        try:
            work()
        finally:
            os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


def test_replicated_gradients_are_summed_alike_from_the_first(forks: Nurseries, tmp_path: Path) -> None:
    """What a process that goes on has made before must not show in its sums; and nobody is told of how that is so."""
    (tmp_path / "alike.py").write_text(ALIKE)
    status, written, errors = forks.run(str(tmp_path / "alike.py"), cwd=ROOT)
    # Lines of three processes may run into each other.
    assert (status, "".join(written.split())) == (0, "[0,0,0]" * 3), errors
    assert "unused parameters" not in errors


def test_sharded_weights_stay_fp32_with_bf16(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks
) -> None:
    results = shutil.copytree(prepared, tmp_path / "results")
    chosen = [*overrides, "training.updates=2", "distribution.strategy=fsdp", "generator.precision=bf16"]
    # bf16's rounding is far above the tolerance of fp32.
    chosen += ["training.log_ratio_tolerance=1"]
    assert ranks({"world": 2, "results": results, "overrides": chosen}) == [[0, 0]]
    newest = list_checkpoints(results / RUN / "checkpoints")[0]
    assert newest.name == "000002"
    (weights,) = (results / RUN / "weights").rglob("*.safetensors")
    for tensors in (load_checkpoint(newest).tensors, load_file(weights)):
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        # Values that bf16 does not have.
        assert any((value != value.bfloat16().float()).any() for value in tensors.values())


def test_a_full_disk_and_a_damaged_file_of_a_sharded_checkpoint(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks
) -> None:
    whole, disturbed = shutil.copytree(prepared, tmp_path / "whole"), shutil.copytree(prepared, tmp_path / "disturbed")
    chosen = [*overrides, "distribution.strategy=fsdp", f"distribution.timeout_seconds={PARTNER}"]
    full: dict[str, Any] = {"world": 2, "results": disturbed, "overrides": chosen}
    # Each of both cannot write the third checkpoint.
    errors = tmp_path / "errors.txt"
    assert ranks(full | {"full_at": [1, 3]}, full | {"full_at": [0, 1]}, errors=errors) == [[1, 1], [1, 1]]
    told = "checkpoints/000003: cannot be written (No space left on device); free disk space"
    assert errors.read_text().count(told) == 2, errors.read_text()
    folder = disturbed / RUN / "checkpoints"
    assert [load_checkpoint(path).update for path in list_checkpoints(folder)] == [2, 1]
    assert not list(folder.glob(".*"))

    piece = folder / "000002" / "tensors-00001-of-00002.safetensors"
    content = piece.read_bytes()
    piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    whole_run = {"world": 2, "results": whole, "overrides": chosen}
    assert ranks(full, whole_run, errors=errors) == [[0, 0], [0, 0]]
    assert f"000002/{piece.name}: damaged (SHA-256" in errors.read_text()
    assert _artifacts(disturbed) == _artifacts(whole)


def test_a_process_that_hangs_while_it_learns_is_named(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks
) -> None:
    """In the second call of the second update, while the others wait for its gradients, or for its weights."""
    jobs: list[dict[str, Any]] = []
    for strategy in ("ddp", "fsdp"):
        results = shutil.copytree(prepared, tmp_path / strategy)
        chosen = [*overrides, f"distribution.timeout_seconds={PARTNER}", f"distribution.strategy={strategy}"]
        # Two samples a micro-batch: of sixteen each process has two an optimizer step, with two transitions each.
        jobs.append({"world": 2, "results": results, "overrides": chosen, "hang_at": 2 * 4 + 2})
    assert ranks(*jobs, errors=tmp_path / "errors.txt") == [[1, 9], [1, 9]]
    told = f"rank 1 did not come within distribution.timeout_seconds {PARTNER}: it hangs, or its node is gone ("
    said = (tmp_path / "errors.txt").read_text()
    assert said.count(f"TrainingError: {told}last seen at update 2, optimizer step 1, call 2)") == 2, said


# ---- through the command line: the launcher and its ranks ---------------------------------------------


class _Launched:
    """`vipo train` on two processes in the background, its ranks by number; with `forks` all of them are forks."""

    def __init__(self, results: Path, overrides: list[str], errors: Path, forks: Nurseries | None = None) -> None:
        self.metrics, self.errors = results / RUN / "metrics.jsonl", errors
        checkpoints = list_checkpoints(results / RUN / "checkpoints")
        self.start = int(checkpoints[0].name) if checkpoints else 0
        command = [VIPO, "train", *overrides, "distribution.processes=2", "--results", str(results)]
        self.process: subprocess.Popen[bytes] | Forked
        with errors.open("wb") as stream:
            if forks is None:
                self.process = subprocess.Popen(command, cwd=ROOT, stderr=stream)
            else:
                self.process = forks.start(*command, cwd=ROOT, stderr=stream, forked_ranks=True)

    def wait(self, told: str, holds: Callable[[], object]) -> None:
        """Wait until something holds that these processes do."""
        eventually(told, holds, ended(self.process, self.errors))

    def updated(self) -> None:
        """Wait until two updates have been made since the start."""

        def made() -> bool:
            return self.metrics.is_file() and self.metrics.read_text().count("\n") >= self.start + 2

        self.wait("two updates", made)

    def ranks(self) -> dict[int, psutil.Process]:
        """The children that have a rank; the launcher also starts short programs, which may end while they are read."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    # A fork's name says which it is; the environment that it was started with is its parent's.
                    fork, environment = re.fullmatch(r"rank (\d+)", child.name()), child.environ()
                    if fork or "RANK" in environment:
                        found[int(fork[1] if fork else environment["RANK"])] = child
        return found

    def started(self) -> dict[int, psutil.Process]:
        """Both ranks, as soon as they are there."""
        self.wait("two ranks", lambda: len(self.ranks()) == 2)
        return self.ranks()

    def ended(self) -> tuple[int, str]:
        return self.process.wait(timeout=SECONDS), self.errors.read_text()


def _beside_the_run(results: Path) -> dict[str, bytes]:
    files = (path for path in results.rglob("*") if path.is_file() and not path.is_relative_to(results / RUN))
    return {str(path.relative_to(results)): path.read_bytes() for path in files}


def _error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error: " in line or line.startswith("ERROR ")]


def test_faults_of_launched_processes(
    prepared: Path, overrides: list[str], tmp_path: Path, ranks: Ranks, forks: Nurseries
) -> None:
    """One run: a rank that is asked to stop while it loads, a rank killed, the launcher killed, a rank that hangs,
    pre-emption beside a second job; then the undisturbed bytes."""
    whole, results = shutil.copytree(prepared, tmp_path / "whole"), shutil.copytree(prepared, tmp_path / "results")
    chosen = [*overrides, "training.updates=400", "training.checkpoint_every=1", "training.save_at=[]"]

    launched = _Launched(results, chosen, tmp_path / "asked.txt")
    launched.started()[1].terminate()
    status, text = launched.ended()
    assert status == 75, text
    assert "all ranks have stopped" in text

    launched = _Launched(results, chosen, tmp_path / "killed.txt", forks)
    launched.updated()
    launched.ranks()[1].kill()
    status, text = launched.ended()
    assert status == 1, text
    first = _error_lines(text)[0]
    assert ": rank 1 (process " in first, text
    assert "was killed by SIGKILL" in first

    # The launcher is gone: its ranks write a checkpoint, though none is due, and end.
    launched = _Launched(results, [*chosen, "training.checkpoint_every=400"], tmp_path / "launcher.txt", forks)
    launched.updated()
    processes = launched.ranks()
    assert sorted(processes) == [0, 1]
    launched.process.kill()
    launched.process.wait()
    eventually("both ranks have ended", lambda: all(map(gone, processes.values())))
    assert int(list_checkpoints(results / RUN / "checkpoints")[0].name) >= launched.start + 2

    launched = _Launched(results, [*chosen, f"distribution.timeout_seconds={PARTNER}"], tmp_path / "hangs.txt", forks)
    launched.updated()
    launched.ranks()[1].suspend()
    status, text = launched.ended()
    assert status == 1, text
    assert f"rank 1 did not come within distribution.timeout_seconds {PARTNER}" in _error_lines(text)[0], text

    launched = _Launched(results, chosen, tmp_path / "preempted.txt", forks)
    launched.updated()
    # Two jobs on one run folder: the second says who writes it, and changes nothing.
    # The first stands still meanwhile, or it might have ended.
    launched.ranks()[0].suspend()
    before = _beside_the_run(results)
    other = [*chosen, "distribution.processes=2", "optimizer.learning_rate=9e-4"]
    status, _, text = forks.run(VIPO, "train", *other, "--results", str(results), cwd=ROOT, forked_ranks=True)
    assert status == 1
    assert _beside_the_run(results) == before
    assert "another process writes it (process" in _error_lines(text)[0]
    launched.ranks()[0].resume()
    launched.process.send_signal(signal.SIGTERM)
    status, text = launched.ended()
    assert status == 75, text
    assert "stopped by SIGTERM after update" in text
    newest = list_checkpoints(results / RUN / "checkpoints")[0]
    stopped = load_checkpoint(newest)
    assert stopped.update >= launched.start + 2

    # As many updates undisturbed: the same state, byte for byte, whatever happened in between.
    assert ranks({"world": 2, "results": whole, "overrides": chosen, "stop_at": stopped.update}) == [[75, 75]]
    same = whole / RUN / "checkpoints" / newest.name
    assert (same / "tensors.safetensors").read_bytes() == (newest / "tensors.safetensors").read_bytes()
    assert load_checkpoint(same).state == stopped.state


def test_torchrun_starts_the_same_run(prepared: Path, overrides: list[str], tmp_path: Path, forks: Nurseries) -> None:
    own, other = shutil.copytree(prepared, tmp_path / "own"), shutil.copytree(prepared, tmp_path / "torchrun")
    launched = _Launched(own, [*overrides, "training.updates=2"], tmp_path / "own.txt", forks)
    status, text = launched.ended()
    assert status == 0, text
    # Not --standalone, which looks up this machine's name: a container's may be in no list.
    port = rendezvous(DistributionConfig(), {})["MASTER_PORT"]
    torchrun = [str(Path(VIPO).with_name("torchrun")), f"--master-port={port}", "--nproc-per-node=2", "--no-python"]
    train = [VIPO, "train", *overrides, "training.updates=2", "distribution.processes=2", "--results", str(other)]
    finished = subprocess.run([*torchrun, *train], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert _artifacts(own) == _artifacts(other)


def test_the_others_wait_while_the_first_rank_waits_for_a_lock(
    prepared: Path, overrides: list[str], tmp_path: Path, forks: Nurseries
) -> None:
    results = shutil.copytree(prepared, tmp_path / "results")
    chosen = [*overrides, "training.updates=1", "training.save_at=[]"]
    chosen += [f"distribution.timeout_seconds={PARTNER}", f"--wait={SECONDS}"]
    with run_lock(results / RUN):
        launched = _Launched(results, chosen, tmp_path / "waited.txt", forks)
        launched.wait("the first rank waits", lambda: "waiting for it" in launched.errors.read_text())
        # Longer than the others would wait for a partner that is not known to wait.
        time.sleep(PARTNER + 2)
    status, text = launched.ended()
    assert status == 0, text
    given = ["vipo", "train", *chosen, "distribution.processes=2", "--results", str(results)]
    assert read_provenance(results / RUN / "provenance.json")["command"] == given
