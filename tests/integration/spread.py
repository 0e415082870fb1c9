"""Gradients of an update by two processes, forked from one that has imported everything.

    spread.py FOLDER NAME:STRATEGY...

NAME is a row of ``tests/families.py`` whose checkpoint is FOLDER/NAME, STRATEGY is ddp or fsdp. Prints, of each, the
largest difference to the gradients of one process over the largest gradient.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from families import FAMILIES
from torch import Tensor
from torch.distributed.tensor import DTensor

from vipo.config.training import DistributionConfig
from vipo.conformance.subject import Subject, lesson, loss_of, subject
from vipo.generators.pipeline import PipelineGenerator
from vipo.training.distribution import Distribution

ROOT = Path(__file__).resolve().parents[2]


def gradients(compared: Subject, generator: PipelineGenerator, rows: list[int]) -> None:
    """Add those of some rows' mean loss."""
    given = {name: value[rows] for name, value in compared.conditioning.items()}
    taught = lesson(compared.load(), compared).select(rows)
    loss_of(taught.log_ratios(generator, given)).backward()


def whole(value: Tensor) -> Tensor:
    """A gradient, gathered."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def rank(compared: Subject, strategy: str, number: int, port: int) -> float | None:
    """One process's part; the first one says how far the gradients are from one process's."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distribution = Distribution(DistributionConfig.model_validate({"processes": 2, "strategy": strategy}), "cpu")
    generator = compared.load("full")
    names = [name for name, value in generator.network.named_parameters() if value.requires_grad]
    generator.network = distribution.wrap(generator.network, "fp32")
    gradients(compared, generator, [number])
    found = dict(distribution.unwrap(generator.network).named_parameters())
    spread = {name: None if (grad := found[name].grad) is None else whole(grad) for name in names}
    dist.barrier()
    dist.destroy_process_group()
    if number:
        return None
    alone = compared.load("full")
    gradients(compared, alone, [0, 1])
    single = {name: value.grad for name, value in alone.network.named_parameters()}
    missing = {name for name in names if (spread[name] is None) != (single[name] is None)}
    # What has no way to the prediction has a gradient of zeros where it is sharded.
    assert all(value is None or not value.any() for name in missing for value in (spread[name], single[name])), missing
    pairs = [(a, b) for name in names if (a := spread[name]) is not None and (b := single[name]) is not None]
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def main() -> None:
    """Run the jobs one after the other."""
    for job in sys.argv[2:]:
        name, strategy = job.split(":")
        row = FAMILIES[name]
        compared = subject(row.config(Path(sys.argv[1]) / name), ROOT, steps=row.steps)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for number in range(2):
            if child := os.fork():
                children.append(child)
                continue
            status = 1
            # torch makes its thread pool anew at a fork's first call of this, and two threads that call it at once, as
            # the backward pass of a network that is spread does, end the process ("Invalid thread pool!").
            torch.set_num_threads(1)
            try:
                if (found := rank(compared, strategy, number, port)) is not None:
                    print(json.dumps([job, found]), flush=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(ends):
            raise SystemExit(f"{job}: the processes ended with {ends}")


if __name__ == "__main__":
    main()
