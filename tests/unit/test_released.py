"""The arms `released_flux` and `released_wan` against what ViPO's public code computes, written out."""

import pytest
import torch
from torch import Tensor

from vipo.config.compose import load_config
from vipo.config.run import Config
from vipo.config.sampling import SamplingConfig
from vipo.credit import Samples, Weights, assign_credit
from vipo.credit.uniform import UniformCredit
from vipo.objectives import (
    Advantages,
    Points,
    Predictions,
    Share,
    allocate_advantages,
    group_advantages,
    load_objective,
)
from vipo.prompts import Prompt
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.rollout import Trajectory

N, STEP = 6, 1
GRID = {"flux": (4, 5), "wan": (2, 4, 5)}


class Maps(UniformCredit):
    """Maps in [0, 1] that a test drew."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps

    def __call__(self, samples: Samples) -> Weights:
        return Weights(self.maps)


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _chain() -> Chain:
    return sampling_chain(SamplingConfig(steps=4, shift=3.0, transition="dance", eta=0.3), "velocity")


def _trajectory(grid: tuple[int, ...]) -> tuple[Trajectory, Tensor, Tensor]:
    """Three transitions of one step each, old velocities and moved ones."""
    chain, states, means = _chain(), [_draw(N, 3, *grid, seed=0)], []
    old = [_draw(N, 3, *grid, seed=10 + step) for step in range(3)]
    for step in range(3):
        mean, std = chain.gaussian(states[-1], old[step], torch.full((N,), step))
        means.append(mean)
        states.append(mean + std * _draw(N, 3, *grid, seed=20 + step))
    new = old[STEP] + 2e-3 * _draw(N, 3, *grid, seed=30)
    return Trajectory(torch.stack(states, dim=1), torch.stack(means, dim=1), states[-1]), old[STEP], new


def _loss(config: Config, grid: tuple[int, ...], rewards: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """By vipo's own parts, as an update puts them together."""
    trajectory, _, new = _trajectory(grid)
    samples = Samples(
        pictures=torch.zeros(N, 3, 8, 8), clean=trajectory.clean, groups=torch.zeros(N, dtype=torch.int64),
        prompts=[Prompt("a", "a", {})] * N, numbers=list(range(N)),
    )  # fmt: skip
    weights = assign_credit({"backbone": Maps(maps)}, samples, config.credit.control).weights
    floor, clip = config.advantages.std_floor, config.advantages.clip
    scalar = group_advantages({"one": rewards}, {"one": 1.0}, samples.groups, floor, clip).values
    velocity = new.clone().requires_grad_(True)
    share = Share(trajectory, torch.full((N,), STEP), _chain(), lambda purpose: [])
    advantages = Advantages(allocate_advantages(scalar, weights), scalar, weights)
    points = Points(trajectory.latents[:, STEP], torch.zeros(N))
    outcome = load_objective(config.objective)(share, points, Predictions(velocity), advantages)
    outcome.loss.backward()
    return outcome.loss.detach(), velocity.grad


def _published(grid: tuple[int, ...], rewards: Tensor, maps: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Sample by sample: the mean, the log-probability, A times the map, the two losses and the larger of them."""
    trajectory, old, new = _trajectory(grid)
    velocity = new.clone().requires_grad_(True)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    sigma, after = (float(level) for level in _chain().levels[STEP : STEP + 2])
    delta, spread, total = sigma - after, 0.3 * (sigma - after) ** 0.5, torch.zeros(())
    for row in range(N):
        x, drawn = trajectory.latents[row, STEP], trajectory.latents[row, STEP + 1]
        logs = []
        for own in (velocity[row], old[row]):
            clean = x - sigma * own
            score = -(x - clean * (1 - sigma)) / sigma**2
            mean = x - delta * own + 0.5 * 0.3**2 * score * delta
            logs.append(-((drawn - mean) ** 2) / (2 * spread**2))
        difference = logs[0].mean() - logs[1].mean() if kind == "flux" else (logs[0] - logs[1]).sum(dim=0)
        ratio, placed = difference.exp(), (advantages[row] * maps[row]).clamp(-5, 5)
        kept = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        total = total + torch.maximum(-placed * ratio, -placed * kept).mean() / N
    total.backward()
    return total.detach(), velocity.grad


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_loss_and_gradient_are_the_published_codes(kind: str) -> None:
    config, grid = load_config(["experiment=demo", f"arm=released_{kind}"]), GRID[kind]
    rewards, maps = _draw(N, seed=1), torch.rand(N, *grid, generator=torch.Generator().manual_seed(2))
    loss, gradient = _loss(config, grid, rewards, maps)
    expected, by_code = _published(grid, rewards, maps, kind)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, by_code, rtol=2e-3, atol=1e-7)
    # Some are clipped and some are not, so that both halves are told.
    moving = gradient.flatten(1).abs().amax(dim=1) > 0 if kind == "flux" else gradient.abs().amax(dim=1) > 0
    assert 0 < int(moving.sum()) < moving.numel()


def test_of_a_map_the_flux_code_reads_the_mean_alone() -> None:
    config, grid = load_config(["experiment=demo", "arm=released_flux"]), GRID["flux"]
    rewards, maps = _draw(N, seed=1), torch.rand(N, *grid, generator=torch.Generator().manual_seed(2))
    turned = maps.flip(-1)
    (one, by_one), (other, by_other) = (_loss(config, grid, rewards, each) for each in (maps, turned))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(by_one, by_other)
    assert config.perception.orientation == "inverted_sklearn"
