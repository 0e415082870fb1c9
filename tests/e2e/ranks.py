"""Trains by several ranks, forked from one process that has imported everything, one job after the other.

    ranks.py JOBS

JOBS is a JSON list of the arguments of `train`. Beside world, results and overrides: ``stop_at`` n lets SIGTERM reach
the last rank alone when it has made update n; ``kill_at`` n kills all ranks then; ``parts`` takes the parts of an
update instead, and writes them to that file, and with ``alike`` grades all samples of its first prompt alike;
``memory`` is how many MiB a rank may take beyond what it has when it begins; ``hang_at`` n lets the last rank hang in
the n-th call of learning until the first rank has ended; ``full_at`` [r, n] lets the disk be full when rank r writes
tensors for the n-th time. Prints the exit statuses of each job's ranks as a JSON line.
"""

import errno
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor


def parts_of_an_update(setup: Any, number: int) -> dict[str, Tensor]:
    """Latents of all samples, their advantages, and each optimizer step's gradients, as update `number` has them."""
    found: dict[str, Tensor] = {}
    from vipo.training import update as room

    learn, step = room.learn, setup.optimizer.step

    def seen_learn(setup: Any, lesson: Any) -> Any:
        batches = lesson.batches
        rows = torch.tensor([row for batch in batches for row in batch.rows])
        latents = room.in_order(setup, torch.cat([batch.trajectory.latents for batch in batches]), batches)
        found["latents"] = latents if setup.distribution.processes > 1 else latents[rows.argsort()]
        found["advantages"] = lesson.advantages.values
        return learn(setup, lesson)

    def seen_step() -> None:
        count = sum(name.startswith("gradient/") for name in found) // len(setup.trainable)
        for name, value in setup.trainable.items():
            whole = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
            found[f"gradient/{count}/{name}"] = whole.clone()
        step()

    room.learn, setup.optimizer.step = seen_learn, seen_step
    metrics = room.update(setup, number)
    found["threads"] = torch.tensor(torch.get_num_threads())
    return found | {f"metric/{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}


def grade_alike(setup: Any, number: int) -> None:
    """Let one of an update's groups have equal rewards."""
    from vipo.training.samples import update_prompts

    config = setup.config
    first = update_prompts(setup.prompts, config.seed, number, config.training.prompts_per_update)[0].text
    (name, sound), *_ = setup.rewards.items()

    def graded(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        scores = sound(images, prompts, metadata).scores
        return scores.masked_fill(torch.tensor([text == first for text in prompts]), 0.5)

    setup.rewards[name] = graded


def hang(call: int, other: int) -> None:
    """Let this process hang in its `call`-th call of learning, and end when the process `other` is gone."""
    from vipo.training import learn

    sound, calls = learn.outcomes_of, iter(range(1, 10_000))

    def hanging(*arguments: Any) -> Any:
        if next(calls) == call:
            # The parent waits for the first rank first: what has ended is gone.
            while psutil.pid_exists(other):
                time.sleep(0.1)
            os._exit(9)
        return sound(*arguments)

    learn.outcomes_of = hanging


def signal_after(update: int, number: int, processes: list[int]) -> None:
    """Let this process send signal `number` to `processes`, then to itself, as soon as it has made `update`.

    Itself, because whoever watches it may look away for longer than all updates take.
    """
    from vipo.training import run

    sound = run.update

    def signalling(setup: Any, made: int, *rest: Any) -> Any:
        metrics = sound(setup, made, *rest)
        if made == update:
            for process in (*processes, os.getpid()):
                os.kill(process, number)
        return metrics

    run.update = signalling


def fill_disk(call: int) -> None:
    """Let this process find the disk full when it writes tensors of a checkpoint for the `call`-th time."""
    from vipo.training import checkpoints

    sound, calls = checkpoints.save_file, iter(range(1, 10_000))

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if next(calls) == call:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        sound(tensors, path, metadata)

    checkpoints.save_file = full


def work(config: Any, experiment: Path, parts: str | None, memory: int | None, alike: bool) -> int:
    """What one rank does; its exit status."""
    from vipo.config.compose import repository_root
    from vipo.errors import Preempted
    from vipo.training.recorded import train_run
    from vipo.training.run import train
    from vipo.training.setup import set_up
    from vipo.training.state import run_identity

    try:
        if memory is not None:
            setup = set_up(config, repository_root(), experiment)
            most = psutil.Process().memory_info().vms + memory * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            train(setup, run_identity(setup))
        elif parts is None:
            train_run(config, repository_root(), experiment)
        else:
            setup = set_up(config, repository_root(), experiment)
            if alike:
                grade_alike(setup, 1)
            found = parts_of_an_update(setup, 1)
            if setup.distribution.is_main:
                save_file({name: value.contiguous() for name, value in found.items()}, parts)
            setup.distribution.leave()
    except Preempted:
        return 75
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def train(world: int, results: Path, overrides: list[str], **spec: Any) -> list[int]:
    """Fork the ranks of one job, disturb them as told, and give their exit statuses."""
    from vipo.config.compose import load_config

    config = load_config([*overrides, f"distribution.processes={world}"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": free.getsockname()[1]}
    children: list[int] = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if world > 1:
                group |= {"RANK": rank, "LOCAL_RANK": rank}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in group.items()}}
            last = rank == world - 1
            if "hang_at" in spec and last:
                hang(spec["hang_at"], children[0])
            if "stop_at" in spec and last:
                signal_after(spec["stop_at"], signal.SIGTERM, [])
            if "kill_at" in spec and last:
                signal_after(spec["kill_at"], signal.SIGKILL, children)
            if spec.get("full_at", [None])[0] == rank:
                fill_disk(spec["full_at"][1])
            status = work(config, results / "demo", spec.get("parts"), spec.get("memory"), "alike" in spec)
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    """Import what the ranks need, once, and run the jobs."""
    import timm  # noqa: F401

    import vipo.generators.flux
    import vipo.training.recorded  # noqa: F401

    for job in json.loads(sys.argv[1]):
        job["results"] = Path(job["results"])
        print(json.dumps(train(**job)), flush=True)


if __name__ == "__main__":
    main()
