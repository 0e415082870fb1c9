"""Where an update's time goes: the share outside the networks, and the network-only floor of the same run.

    python -m benchmarks.update_share experiment=demo arm=vipo --updates 5

Networks: the generator (forward and backward), the decoder, the backbone and the reward models; all else (noise,
transitions, log-probabilities, advantages, the maps beyond the backbone, optimizer, bookkeeping) is the overhead. The
floor is the bare minimum of the design's cost contract: G x T forward passes and G x T_trained forward and backward
passes of the generator in the update's own micro-batches, nothing else.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.credit.backbone import BackboneCredit
from vipo.stages import encode_stage, prepare_stage
from vipo.training.setup import Setup, set_up
from vipo.training.update import update


class NetworkClock:
    """Adds up the seconds spent in wrapped calls, without counting nested ones twice."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - start

        return timed


def instrument(setup: Setup, clock: NetworkClock) -> None:
    """Time every network of `setup`: calls of the modules, and backward passes as a whole."""
    network: Any = setup.generator.network
    network.forward = clock.wrap(network.forward)
    vae: Any = setup.generator.vae  # type: ignore[attr-defined]
    vae.decode = clock.wrap(vae.decode)
    source = setup.sources.get("backbone")
    if isinstance(source, BackboneCredit):
        backbone: Any = source.structuring.backbone
        backbone.forward = clock.wrap(backbone.forward)
    for name, reward in setup.rewards.items():
        setup.rewards[name] = clock.wrap(reward)


def floor_seconds(setup: Setup) -> float:
    """Seconds of the generator's unavoidable passes of one update."""
    training, sampling = setup.config.training, setup.config.sampling
    generator, size = setup.generator, training.micro_batch
    first = next(iter(setup.embeddings.values()))
    conditioning = {name: value.expand(size, *value.shape).contiguous() for name, value in first.items()}
    latents, sigma = (
        torch.zeros(size, *generator.latent_shape, device=setup.device),
        torch.full((size,), 0.5, device=setup.device),
    )
    batches = training.prompts_per_update * training.group_size // size
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(batches * sampling.steps):
            generator.predict(latents, sigma, conditioning)
    for _ in range(batches * training.trained_transitions * training.epochs):
        generator.predict(latents, sigma, conditioning).sum().backward()
    setup.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main() -> None:
    """Print one JSON object with medians over the measured updates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="Hydra overrides")
    parser.add_argument("--updates", type=int, default=5)
    arguments = parser.parse_args()
    config, root = load_config(arguments.overrides), repository_root()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        prepare_stage(config, root, results)
        encode_stage(config, root, results)
        setup = set_up(config, root, results / config.experiment.name)
        update(setup, 1)
        setup.timer.pop()
        floors = [floor_seconds(setup) for _ in range(2)]
        clock = NetworkClock()
        instrument(setup, clock)
        backward = Tensor.backward
        Tensor.backward = clock.wrap(backward)  # type: ignore[method-assign]
        rows = []
        try:
            for number in range(2, arguments.updates + 2):
                clock.seconds = 0.0
                start = time.perf_counter()
                update(setup, number)
                total = time.perf_counter() - start
                rows.append((total, clock.seconds, setup.timer.pop()))
        finally:
            Tensor.backward = backward  # type: ignore[method-assign]
        floors += [floor_seconds(setup) for _ in range(2)]
    total = statistics.median(row[0] for row in rows)
    floor = statistics.median(floors)
    parts = {name: statistics.median(row[2][name] for row in rows) for name in rows[0][2]}
    print(
        json.dumps(
            {
                "run": config.run_name,
                "updates": arguments.updates,
                "seconds_per_update": round(total, 4),
                "share_outside_networks": round(statistics.median(1 - row[1] / row[0] for row in rows), 4),
                "network_floor_seconds": round(floor, 4),
                "update_over_floor": round(total / floor, 4),
                "parts": {name: round(value, 4) for name, value in parts.items()},
                "threads": config.training.threads,
                "torch": torch.__version__,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
