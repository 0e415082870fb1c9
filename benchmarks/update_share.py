"""Where an update's time goes: what lies outside the calls of network, decoder, reward and backbone.

    python -m benchmarks.update_share experiment=demo arm=vipo --updates 5

On the CPU, in seconds of the processor: what else runs on the machine is not in them. The floor of an update is what
its own calls of the generator (forward and backward), decoder, backbone and rewards took; all else (noise, transitions,
log-probabilities, advantages, the maps beyond the backbone, optimizer, bookkeeping) is the overhead.
"""

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.credit.backbone import BackboneCredit
from vipo.runtime import settle_runtime
from vipo.stages import encode_stage, prepare_stage
from vipo.tracking.timer import Timer
from vipo.training.setup import Setup, set_up
from vipo.training.update import update


class ProcessorTimer(Timer):
    """Seconds of the processor, of all threads of this process."""

    def _now(self) -> float:
        return time.process_time()


class Calls:
    """Counts wrapped calls by name, and adds up their processor seconds without counting nested ones twice."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.counts: Counter[str] = Counter()
        self._depth = 0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self.counts[name] += 1
            self._depth += 1
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.process_time() - start

        return timed

    @property
    def inside(self) -> bool:
        """Whether a wrapped call is being made."""
        return self._depth > 0

    def start(self) -> None:
        """Count from zero."""
        self.seconds, self.counts = 0.0, Counter()


@contextmanager
def watched(setup: Setup) -> Iterator[Calls]:
    """Count every network of `setup`: calls of the modules, and backward passes as a whole."""
    calls = Calls()
    network: Any = setup.generator.network
    vae: Any = setup.generator.vae  # type: ignore[attr-defined]
    owners: list[tuple[Any, str, str]] = [(network, "forward", "network"), (vae, "decode", "decoder")]
    source = setup.sources.get("backbone")
    if isinstance(source, BackboneCredit):
        owners.append((source.structuring.backbone, "forward", "backbone"))
    owners.append((Tensor, "backward", "backward"))
    before = [(owner, method, getattr(owner, method)) for owner, method, _ in owners]
    rewards = dict(setup.rewards)
    for (owner, method, sound), (_, _, name) in zip(before, owners, strict=True):
        setattr(owner, method, calls.wrap(name, sound))
    setup.rewards.update({label: calls.wrap("reward", reward) for label, reward in rewards.items()})
    try:
        yield calls
    finally:
        setup.rewards.update(rewards)
        for owner, method, sound in before:
            setattr(owner, method, sound)


@contextmanager
def loaded(config: Config) -> Iterator[Setup]:
    """A run of `config`, set up in a temporary folder, with a timer of processor seconds."""
    root = repository_root()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        prepare_stage(config, root, results)
        encode_stage(config, root, results)
        yield replace(
            set_up(config, root, results / config.experiment.name), timer=ProcessorTimer(config.generator.device)
        )


def measure(setup: Setup, updates: int) -> dict[str, Any]:
    """Medians over `updates` updates, after one that is not counted."""
    update(setup, 1)
    setup.timer.pop()
    rows = []
    with watched(setup) as calls:
        for number in range(2, updates + 2):
            calls.start()
            start = time.process_time()
            update(setup, number)
            rows.append((time.process_time() - start, calls.seconds, setup.timer.pop(), dict(calls.counts)))
    parts = {name: statistics.median(row[2][name] for row in rows) for name in rows[0][2]}
    return {
        "cpu_seconds_per_update": statistics.median(row[0] for row in rows),
        "update_over_floor": statistics.median(row[0] / row[1] for row in rows),
        "share_outside_networks": statistics.median(1 - row[1] / row[0] for row in rows),
        "map_share": statistics.median(row[2].get("time/map", 0.0) / row[0] for row in rows),
        "parts": parts,
        "calls": rows[-1][3],
    }


def command_seconds(command: Sequence[str]) -> float:
    """Processor seconds of a command and of all that it starts; it must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="Hydra overrides")
    parser.add_argument("--updates", type=int, default=5)
    arguments = parser.parse_args()
    settle_runtime()
    config = load_config(arguments.overrides)
    with loaded(config) as setup:
        found = measure(setup, arguments.updates)
    told = {"run": config.run_name, "updates": arguments.updates, "threads": config.training.threads}
    print(json.dumps(told | {"torch": torch.__version__} | _rounded(found), indent=1))


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _rounded(value) if isinstance(value, dict) else round(value, 4) if isinstance(value, float) else value
        for name, value in values.items()
    }


if __name__ == "__main__":
    main()
