"""docs/credit.md, "In a GRPO loop of yours": its lines in a loop that is written as flow_grpo's and DanceGRPO's are."""

import itertools
import math
import re

import torch
from toy_generator import ToyGenerator, left_redness

from vipo.config.compose import repository_root

PAGE = (repository_root() / "docs" / "credit.md").read_text(encoding="utf-8")
GROUP, PROMPTS, CLIP = 8, 2, 1e-3
INDEX = torch.arange(PROMPTS).repeat_interleave(GROUP)


def _page() -> dict:
    (block,) = re.findall(r"## In a GRPO loop of yours.*?```python\n(.*?)```", PAGE, re.DOTALL)
    # The import, a function of one line, and the loss.
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    names = {"torch": torch}
    exec(block, names)
    return names


def _step_with_log_prob(x, velocity, sigma, sigma_next, noise=None, following=None):
    """One step and its log-probability per element, as such loops have them; eta 0.3."""
    dt = sigma - sigma_next
    mean = x - dt * (velocity + 0.09 / (2 * sigma) * (x + (1 - sigma) * velocity))
    std = 0.3 * math.sqrt(dt)
    following = mean + std * noise if following is None else following
    return following, -((following - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))


def _sampled(network: torch.nn.Module):
    draw = torch.Generator().manual_seed(0)
    # The same initial noise in a group.
    x = torch.randn(PROMPTS, 2, 4, 4, generator=draw)[INDEX]
    sigmas, states = [1.0, 0.75, 0.5, 0.25, 0.0], [x]
    shift = torch.zeros(len(x))
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas[:4]):
            velocity = network(x, torch.full((len(x),), sigma), shift)
            x, _ = _step_with_log_prob(x, velocity, sigma, following, torch.randn(x.shape, generator=draw))
            states.append(x)
        clean = x - 0.25 * network(x, torch.full((len(x),), 0.25), shift)
    return sigmas, states, clean


def _log_prob(network, sigmas, states, step):
    sigma = torch.full((len(states[0]),), sigmas[step])
    velocity = network(states[step], sigma, torch.zeros(len(sigma)))
    return _step_with_log_prob(states[step], velocity, sigmas[step], sigmas[step + 1], following=states[step + 1])[1]


def _advantages(reward: torch.Tensor) -> torch.Tensor:
    groups = reward.reshape(PROMPTS, GROUP)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def test_with_weights_of_one_it_is_the_loop_as_it_was() -> None:
    page, generator = _page(), ToyGenerator()
    network = generator.network
    sigmas, states, clean = _sampled(network)
    advantages = _advantages(left_redness(generator.decode(clean), [], []))
    before = _log_prob(network, sigmas, states, 1).detach()
    log_prob = _log_prob(network, sigmas, states, 1)
    ratio = torch.exp(log_prob.mean(dim=(1, 2, 3)) - before.mean(dim=(1, 2, 3)))
    plain = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    ours = page["policy_loss"](log_prob.mean(dim=1), before.mean(dim=1), advantages, torch.ones(16, 4, 4), CLIP)
    parameters = list(network.parameters())
    for one, other in zip(
        torch.autograd.grad(plain, parameters, retain_graph=True), torch.autograd.grad(ours, parameters), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_loop_trains_with_credit_and_clips_by_the_sample() -> None:
    page, generator = _page(), ToyGenerator()
    network = generator.network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    rewards = []
    for _ in range(4):
        sigmas, states, clean = _sampled(network)
        reward = left_redness(generator.decode(clean), [], [])
        rewards.append(float(reward.mean()))
        advantages, weights = _advantages(reward), page["credit"](clean, INDEX)
        torch.testing.assert_close(weights.mean(dim=(1, 2)), torch.ones(16))
        for step in range(3):
            old = _log_prob(network, sigmas, states, step).detach().mean(dim=1)
            loss = page["policy_loss"](
                _log_prob(network, sigmas, states, step).mean(dim=1), old, advantages, weights, CLIP
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    # The same noise each time: what changed is the policy.
    assert rewards == sorted(rewards)
    assert rewards[-1] > rewards[0] + 1e-3
    far = torch.full((16, 4, 4), 2 * CLIP, requires_grad=True)
    page["policy_loss"](far, torch.zeros(16, 4, 4), torch.ones(16), torch.ones(16, 4, 4), CLIP).backward()
    assert far.grad.count_nonzero() == 0
    page["policy_loss"](far, torch.zeros(16, 4, 4), -torch.ones(16), torch.ones(16, 4, 4), CLIP).backward()
    assert far.grad.count_nonzero() == far.numel()
