"""Flow-DPPO's gate against the published rule element by element, torch.distributions and hand-computed cases."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from vipo.config.objective import DivergenceGateConfig
from vipo.objectives.divergence import DivergenceGate, divergence_mask
from vipo.objectives.gates import Gated, Moved
from vipo.objectives.surrogate import GatedLoss, gated_surrogate
from vipo.sampling.transitions import position_kl, position_log_prob

PLACES = [(3, 4), (2, 3, 4)]


def _transition(places: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drawn state, new mean (a leaf), old mean and std of six samples: some near, some far, on both sides."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(6, 2, *places, generator=generator)
    std = torch.rand(6, 1, *([1] * len(places)), generator=generator) + 0.1
    value = old + std * torch.randn(old.shape, generator=generator)
    size = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.3]).reshape(std.shape)
    new = old + size * std * torch.randn(old.shape, generator=generator)
    return value, new.requires_grad_(), old, std


def _of(value: Tensor, new: Tensor, old: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    log_ratio = position_log_prob(value, new, std) - position_log_prob(value, old, std)
    return log_ratio, position_kl(new, old, std)


def _loss(log_ratio: Tensor, advantages: Tensor, dropped: Tensor) -> GatedLoss:
    gated = Gated(dropped, torch.zeros_like(advantages))
    return gated_surrogate(log_ratio, advantages, gated, ratio="position" if advantages.ndim > 1 else "sample")


def _published(log_ratio: Tensor, kl: Tensor, advantage: float, bound: float) -> Tensor | float:
    """One element of the published loss: ``-A rho``, or 0 where it is far and goes further."""
    rho = log_ratio.exp()
    keep = float(kl.detach()) < bound
    positive = not keep and float(rho.detach()) > 1 and advantage > 0
    negative = not keep and float(rho.detach()) < 1 and advantage < 0
    return 0.0 if positive or negative else -advantage * rho


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("bound", [1e-8, 1e-5, 1e-2, 1.0])
def test_per_transition_it_is_the_published_loss(places: tuple[int, ...], bound: float) -> None:
    value, new, old, std = _transition(places)
    advantages = torch.tensor([1.0, -1.0, -2.0, 0.5, -1.5, -2.0])
    log_ratio, kl = _of(value, new, old, std)
    dropped = divergence_mask(log_ratio, kl, advantages, scope="sample", bound=bound)
    result = _loss(log_ratio, advantages, dropped)
    (gradient,) = torch.autograd.grad(result.loss, new)
    # The published code: one Gaussian log-probability and one divergence, both means over all elements.
    rows = []
    for row in range(6):
        policies = [Normal(mean[row], std[row]) for mean in (new, old)]
        logs = [policy.log_prob(value[row]).mean() for policy in policies]
        divergence = kl_divergence(policies[1], policies[0]).mean()
        rows.append(_published(logs[0] - logs[1], divergence, float(advantages[row]), bound))
    expected = sum(rows, torch.zeros(())) / 6
    torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=1e-6)
    if expected.requires_grad:
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, new)[0], rtol=1e-3, atol=1e-6)
    else:
        assert not bool(gradient.any())
    assert result.clipped.tolist() == [float(isinstance(row, float)) for row in rows]


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("scope", ["sample", "position"])
def test_per_position_it_is_an_explicit_loop(places: tuple[int, ...], scope: str) -> None:
    value, new, old, std = _transition(places)
    weights = torch.rand(6, *places, generator=torch.Generator().manual_seed(1))
    weights[:, 0] = 0
    advantages = weights * torch.tensor([1.0, -1.0, -2.0, 0.5, -1.5, -2.0]).reshape(-1, *([1] * len(places)))
    log_ratio, kl = _of(value, new, old, std)
    dropped = divergence_mask(log_ratio, kl, advantages, scope=scope, bound=1e-3)
    result = _loss(log_ratio, advantages, dropped)
    (gradient,) = torch.autograd.grad(result.loss, new, retain_graph=True)
    total, lost = torch.zeros(()), torch.zeros(6)
    for place in itertools.product(range(6), *(range(n) for n in places)):
        gate = log_ratio[place] if scope == "position" else log_ratio[place[0]].mean()
        far = kl[place] if scope == "position" else kl[place[0]].mean()
        term = _published(gate, far, float(advantages[place]), 1e-3)
        if isinstance(term, float):
            lost[place[0]] += 1 / math.prod(places)
        else:
            total = total - advantages[place] * log_ratio[place].exp() / (6 * math.prod(places))
    torch.testing.assert_close(result.loss, total, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, new)[0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(result.clipped, lost)
    assert 0 < float(lost.mean()) < 1


@pytest.mark.parametrize("scope", ["sample", "position"])
def test_the_gate_is_its_function(scope: str) -> None:
    value, new, old, std = (tensor.detach() for tensor in _transition((3, 4)))
    log_ratio, kl = _of(value, new, old, std)
    advantages = torch.tensor([1.0, -1.0, -2.0, 0.5, -1.5, -2.0]).reshape(-1, 1, 1).expand(6, 3, 4)
    gate = DivergenceGate(DivergenceGateConfig(name="divergence", scope=scope, bound=1e-3))
    decided = gate(Moved(log_ratio, advantages, new, old, std))
    assert torch.equal(decided.dropped, divergence_mask(log_ratio, kl, advantages, scope=scope, bound=1e-3))
    assert decided.ratio is not None
    assert not bool(decided.ratio.any())


def test_by_hand() -> None:
    """Near, far and further, far and back, for either sign of the advantage; the bound itself is far."""
    log_ratio = torch.tensor([0.2, 0.2, -0.2, 0.2, -0.2, -0.2]).reshape(6, 1, 1)
    kl = torch.tensor([0.9e-5, 1e-5, 2e-5, 2e-5, 2e-5, 0.9e-5]).reshape(6, 1, 1)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    dropped = divergence_mask(log_ratio, kl, advantages, scope="sample", bound=1e-5)
    assert dropped.tolist() == [False, True, False, False, True, False]
    loss = _loss(log_ratio, advantages, dropped).loss
    up, down = math.exp(0.2), math.exp(-0.2)
    assert float(loss) == pytest.approx(-(up + down - up - down) / 6, abs=1e-7)
    assert float(_loss(log_ratio[:3], advantages[:3], dropped[:3]).loss) == pytest.approx(-(up + down) / 3)


def test_a_bound_of_the_mean_is_one_of_the_sum_divided_by_the_elements() -> None:
    """The paper's divergence is of the whole transition; code and gate take the mean, at any number of elements."""
    value, new, old, std = (tensor.detach().double() for tensor in _transition((3, 4)))
    _, kl = _of(value, new, old, std)
    whole = [
        kl_divergence(*(Independent(Normal(mean[row], std[row].expand_as(mean[row])), 3) for mean in (old, new)))
        for row in range(6)
    ]
    torch.testing.assert_close(kl.flatten(1).mean(dim=1) * 2 * 3 * 4, torch.stack(whole))


def test_samples_may_be_permuted() -> None:
    value, new, old, std = _transition((3, 4))
    advantages = torch.tensor([1.0, -1.0, -2.0, 0.5, -1.5, -2.0])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    log_ratio, kl = _of(value, new, old, std)
    dropped = divergence_mask(log_ratio, kl, advantages, scope="sample", bound=1e-4)
    permuted = divergence_mask(log_ratio[order], kl[order], advantages[order], scope="sample", bound=1e-4)
    assert torch.equal(permuted, dropped[order])
    assert 0 < int(dropped.sum()) < 6
    loss = _loss(log_ratio, advantages, dropped).loss
    torch.testing.assert_close(_loss(log_ratio[order], advantages[order], permuted).loss, loss)


@pytest.mark.parametrize("scope", ["sample", "position"])
def test_equal_rewards_give_no_gradient(scope: str) -> None:
    value, new, old, std = _transition((3, 4))
    log_ratio, kl = _of(value, new, old, std)
    advantages = torch.zeros(6, 3, 4)
    dropped = divergence_mask(log_ratio, kl, advantages, scope=scope, bound=1e-6)
    result = _loss(log_ratio, advantages, dropped)
    assert result.loss.item() == 0
    assert not bool(dropped.any())
    assert not bool(torch.autograd.grad(result.loss, new)[0].any())


def test_what_is_dropped_may_overflow() -> None:
    log_ratio = torch.tensor([[[800.0, 0.5]]], requires_grad=True)
    advantages = torch.ones(1, 1, 2)
    dropped = divergence_mask(log_ratio, torch.tensor([[[9.0, 0.0]]]), advantages, scope="position", bound=1e-5)
    loss = _loss(log_ratio, advantages, dropped).loss
    loss.backward()
    assert log_ratio.grad is not None
    assert loss.item() == pytest.approx(-math.exp(0.5) / 2)
    assert log_ratio.grad.flatten().tolist() == pytest.approx([0, -math.exp(0.5) / 2])


def test_shapes_are_checked() -> None:
    ratios = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"kl: expected shape \(2, 3, 4\) of log_ratio, got \(2,\)"):
        divergence_mask(ratios, torch.zeros(2), torch.zeros(2), scope="sample", bound=1e-5)
    with pytest.raises(ValueError, match=r"advantages: expected shape \(2, 3, 4\) for scope 'position', got \(2,\)"):
        divergence_mask(ratios, ratios, torch.zeros(2), scope="position", bound=1e-5)
