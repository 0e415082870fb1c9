"""What well-known slips of diffusion RL do, measured: docs/pitfalls.md quotes it.

    python -m benchmarks.pitfalls experiment=demo arm=uniform
    python -m benchmarks.pitfalls experiment=demo arm=uniform generator.precision=bf16 training.lora={} --compiled

One group is rolled out; then each slip is made on its own, on what was drawn. Nothing is trained.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vipo.config.compose import load_config, repository_root
from vipo.generators.embeddings import stack_conditioning
from vipo.generators.kernels import EXACT, repeated_blocks
from vipo.objectives.advantages import group_advantages
from vipo.prompts import Prompt
from vipo.rewards import score
from vipo.sampling.noise import Key
from vipo.sampling.rollout import Trajectory, rollout
from vipo.sampling.transitions import Channels, position_log_prob
from vipo.stages import encode_stage, prepare_stage
from vipo.training.setup import Setup, set_up

GROUP = 8
#: Size of a weight's random change, relative to the root mean square of its tensor.
CHANGE = 1e-3


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="Hydra overrides")
    parser.add_argument("--compiled", action="store_true", help="compiled blocks instead; a minute of compilation")
    arguments = parser.parse_args()
    config, root = load_config(arguments.overrides), repository_root()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        prepare_stage(config, root, results)
        encode_stage(config, root, results)
        setup = set_up(config, root, results / config.experiment.name)
        print(json.dumps((measure_compiled if arguments.compiled else measure)(setup), indent=1))


@torch.no_grad()
def measure(setup: Setup) -> dict[str, float]:
    """Every slip's figures, by name."""
    prompt, (drawn, conditioning) = setup.prompts[0], _drawn(setup)
    right = _old(setup, drawn, "mean")
    figures = {"nothing wrong: max |log rho|": _largest(_log_probs(setup, drawn, conditioning) - right)}

    rounded = Trajectory(drawn.latents.bfloat16().float(), drawn.means, drawn.clean)
    ratio = _log_probs(setup, rounded, conditioning) - right
    figures |= {
        "latents stored in bf16: max |log rho|, position": _largest(ratio),
        "latents stored in bf16: mean of the samples' log rho": float(ratio.mean()),
    }
    alone = torch.cat(
        [_log_probs(setup, drawn.select(torch.tensor([row])), _row(conditioning, row)) for row in range(GROUP)],
        dim=1,
    )
    figures["update in batches of 1, rollout of 8: max |log rho|, position"] = _largest(alone - right)

    network = setup.distribution.unwrap(setup.generator.network)
    was = copy.deepcopy(network.state_dict())
    generator = torch.Generator().manual_seed(0)
    for value in network.parameters():
        value.add_(CHANGE * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator))
    for channels in ("mean", "sum"):
        ratio = _log_probs(setup, drawn, conditioning, channels) - _old(setup, drawn, channels)
        figures[f"channels {channels}: rms log rho, position"] = float(ratio.square().mean().sqrt())
        scalar = ratio.mean(dim=(-2, -1))
        figures[f"channels {channels}: rms log rho, sample"] = float(scalar.square().mean().sqrt())
    network.load_state_dict(was)

    figures |= _decoder(setup, drawn.clean, prompt)
    figures |= _floor() | _bf16_weights(network.parameters())
    return figures


def measure_compiled(setup: Setup) -> dict[str, float]:
    """Blocks are compiled once without gradients, for the rollout, and once with them, for the update."""
    figures = {}
    for told, options in (("as the compiler does by itself", {}), ("each operation rounded for itself", EXACT)):
        torch._dynamo.reset()
        for block in repeated_blocks(setup.distribution.unwrap(setup.generator.network)):
            block.compile(fullgraph=True, dynamic=False, options=dict(options))
        drawn, conditioning = _drawn(setup)
        ratio = _log_probs(setup, drawn, conditioning) - _old(setup, drawn, "mean")
        figures[f"compiled, {told}: max |log rho|, position"] = _largest(ratio.detach())
    return figures


def _drawn(setup: Setup) -> tuple[Trajectory, dict[str, Tensor]]:
    """A group of the first prompt, and its conditioning."""
    prompt = setup.prompts[0]
    keys: list[Key] = [(setup.config.seed, "pitfalls", prompt.id, row) for row in range(GROUP)]
    conditioning = stack_conditioning(setup.embeddings, [prompt.id] * GROUP)
    return rollout(
        setup.generator, conditioning, setup.chain, setup.chain.trainable, [keys[0]] * GROUP, keys
    ), conditioning


def _log_probs(setup: Setup, drawn: Trajectory, conditioning: dict[str, Tensor], channels: Channels = "mean") -> Tensor:
    """Log-probability of every transition under the network as it is now, ``(T - 1, B, H, W)``."""
    chain, rows = setup.chain, []
    for step in chain.trainable:
        x = drawn.latents[:, step]
        prediction = setup.generator.predict(x, chain.times[step].expand(len(x)), conditioning)
        mean, std = chain.gaussian(x, prediction, torch.full((len(x),), step))
        rows.append(position_log_prob(drawn.latents[:, step + 1], mean, std, channels))
    return torch.stack(rows)


def _old(setup: Setup, drawn: Trajectory, channels: Channels) -> Tensor:
    """The same under the policy that sampled, from the means that it left."""
    rows = []
    for step in setup.chain.trainable:
        x = drawn.latents[:, step]
        _, std = setup.chain.gaussian(x, x, torch.full((len(x),), step))
        rows.append(position_log_prob(drawn.latents[:, step + 1], drawn.means[:, step], std, channels))
    return torch.stack(rows)


def _decoder(setup: Setup, clean: Tensor, prompt: Prompt) -> dict[str, float]:
    """Pictures and the order of a group under an autoencoder in bf16."""
    right = setup.generator.pictures(clean)
    with torch.autocast("cpu", torch.bfloat16):
        low = setup.generator.pictures(clean).float()
    (name, reward), *_ = setup.rewards.items()
    texts, metadata = [prompt.text] * GROUP, [prompt.metadata] * GROUP
    first, second = (score(name, reward, pictures, texts, metadata) for pictures in (right, low))
    change = (first - second).abs().mean() / first.std()
    return {
        "autoencoder in bf16: mean change of a pixel": float((right - low).abs().mean()),
        "autoencoder in bf16: mean change of the reward, in its group's standard deviations": float(change),
    }


def _floor() -> dict[str, float]:
    """Advantages of a group whose rewards differ by rounding alone."""
    rewards = 0.7 + 1e-7 * torch.randn(GROUP, generator=torch.Generator().manual_seed(0))
    groups = torch.zeros(GROUP, dtype=torch.int64)
    return {
        f"equal rewards, floor {floor:g}: largest advantage": _largest(
            group_advantages({"reward": rewards}, {"reward": 1.0}, groups, floor, 5.0).values
        )
        for floor in (1e-8, 1e-4)
    }


def _bf16_weights(parameters: Iterable[nn.Parameter]) -> dict[str, float]:
    """Share of weights that one AdamW step of the Wan recipe (5e-6) moves at all where they are bf16."""
    moved, count = 0, 0
    for value in parameters:
        low = value.detach().bfloat16()
        # Adam's first step is the learning rate times the sign.
        moved += int((low - torch.tensor(5e-6) != low).sum())
        count += low.numel()
    return {"AdamW on bf16 weights at 5e-6: share of weights that move": moved / count}


def _row(conditioning: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[[row]] for name, value in conditioning.items()}


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


if __name__ == "__main__":
    main()
