"""Advantage Weighted Matching against explicit loops, the published code's formula written anew, and by hand."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from vipo.objectives.advantages import group_advantages
from vipo.objectives.awm import matching_log_prob, matching_loss

PLACES = [(3, 4), (2, 3, 4)]


def _draw(places: tuple[int, ...], batch: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction (a leaf), velocity, times and credit."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 2, *places)
    prediction = torch.randn(shape, generator=generator).requires_grad_()
    credit = 2 * torch.rand(batch, *places, generator=generator)
    return prediction, torch.randn(shape, generator=generator), torch.rand(batch, generator=generator), credit


def _loop(prediction: Tensor, velocity: Tensor, times: Tensor, credit: Tensor, weight: str) -> Tensor:
    batch, channels, *places = prediction.shape
    values = []
    for row in range(batch):
        loss = torch.zeros(())
        for place in itertools.product(range(channels), *(range(n) for n in places)):
            error = (prediction[(row, *place)] - velocity[(row, *place)]) ** 2
            loss = loss + credit[(row, *place[1:])] * error / (channels * math.prod(places))
        t = float(times[row])
        if weight == "ghuber":
            values.append(-t / 0.25 * ((loss + 1e-10) ** 0.25 - 1e-10**0.25))
        else:
            values.append(-{"uniform": 1.0, "t": t, "t2": t * t}[weight] * loss)
    return torch.stack(values)


def _log_prob(given: tuple[Tensor, ...], weight: str) -> Tensor:
    if weight == "ghuber":
        return matching_log_prob(*given, form="code", power=0.25)
    return matching_log_prob(*given, form="paper", time_weight=weight)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("weight", ["uniform", "t", "t2", "ghuber"])
def test_value_and_gradient_are_an_explicit_loop(places: tuple[int, ...], weight: str) -> None:
    given = _draw(places)
    values, expected = _log_prob(given, weight), _loop(*given, weight)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(v.sum(), given[0])[0] for v in (values, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weight", ["uniform", "ghuber"])
def test_without_credit_it_is_the_published_scalar_form(weight: str) -> None:
    prediction, velocity, times, _ = _draw((3, 4))
    # As the public code has it, in double.
    published = (-((prediction.double() - velocity.double()) ** 2)).mean(dim=(1, 2, 3))
    if weight == "ghuber":
        published = -((-published + 1e-10) ** 0.25 - torch.tensor(1e-10).double() ** 0.25) * times / 0.25
    for credit in (None, torch.ones(4, 3, 4)):
        values = _log_prob((prediction, velocity, times, credit), weight)
        torch.testing.assert_close(values, published.float(), rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    """Two positions with errors 3 and 1 and weights .5 and 1.5: l = (.5 * 9 + 1.5 * 1) / 2 = 3."""
    prediction, velocity = torch.tensor([[[[4.0, 2.0]]]]), torch.ones(1, 1, 1, 2)
    given = (prediction, velocity, torch.tensor([0.5]), torch.tensor([[[0.5, 1.5]]]))
    assert float(_log_prob(given, "uniform")) == -3
    assert float(_log_prob(given, "t2")) == -0.75
    assert float(_log_prob(given, "ghuber")) == pytest.approx(-2 * (3**0.25 - 1e-10**0.25))


def test_on_policy_the_gradient_is_the_weighted_loss_of_pretraining() -> None:
    prediction, velocity, times, credit = _draw((3, 4))
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0])
    log_prob = matching_log_prob(prediction, velocity, times, credit, form="paper")
    matched, _ = matching_loss(log_prob - log_prob.detach(), advantages, 1.0)
    (gradient,) = torch.autograd.grad(matched, prediction)
    weighted = credit.unsqueeze(1) * (prediction - velocity) ** 2
    loss = (advantages * weighted.flatten(1).mean(dim=1)).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, prediction)[0], rtol=1e-4, atol=1e-7)


def test_one_clipped_ratio_a_sample_and_time() -> None:
    """Against the published maximum of both losses: ratios e^-1 to e^1, clip .5."""
    log_ratio = torch.tensor([-1.0, -0.1, 0.1, 1.0, -1.0, 1.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    loss, dropped = matching_loss(log_ratio, advantages, 0.5)
    rho = log_ratio.exp()
    published = torch.maximum(-advantages * rho, -advantages * rho.clamp(0.5, 1.5)).mean()
    torch.testing.assert_close(loss, published)
    gradients = [torch.autograd.grad(v, log_ratio, retain_graph=True)[0] for v in (loss, published)]
    torch.testing.assert_close(*gradients)
    assert dropped.tolist() == [False, False, False, True, True, False]
    assert gradients[0].ne(0).tolist() == [not flag for flag in dropped.tolist()]


def test_equal_rewards_give_no_gradient() -> None:
    prediction, velocity, times, credit = _draw((3, 4))
    groups = torch.zeros(4, dtype=torch.int64)
    advantages = group_advantages({"r": torch.full((4,), 0.3)}, {"r": 1.0}, groups, 1e-4, 5).values
    log_prob = matching_log_prob(prediction, velocity, times, credit, form="code")
    loss, _ = matching_loss(log_prob - log_prob.detach() + 0.1, advantages, 1.0)
    assert not bool(torch.autograd.grad(loss, prediction)[0].any())


@pytest.mark.parametrize("form", ["paper", "code"])
def test_positions_of_no_weight_say_nothing(form: str) -> None:
    prediction, velocity, times, credit = _draw((3, 4))
    credit[:, 1] = 0
    values = matching_log_prob(prediction, velocity, times, credit, form=form)
    (gradient,) = torch.autograd.grad(values.sum(), prediction)
    assert not bool(gradient[:, :, 1].any())
    assert bool(gradient[:, :, 0].all())


def test_samples_may_be_permuted() -> None:
    given = _draw((3, 4))
    order = torch.tensor([2, 0, 3, 1])
    for form in ("paper", "code"):
        values = matching_log_prob(*given, form=form)
        torch.testing.assert_close(matching_log_prob(*(v[order] for v in given), form=form), values[order])


@pytest.mark.parametrize("form", ["paper", "code"])
def test_half_precision_predictions_are_summed_in_fp32(form: str) -> None:
    prediction, *rest = _draw((16, 16))
    half = prediction.detach().bfloat16()
    values = matching_log_prob(half, *rest, form=form)
    assert values.dtype == torch.float32
    assert torch.equal(values, matching_log_prob(half.float(), *rest, form=form))


def test_a_perfect_match_is_finite() -> None:
    prediction = torch.zeros(1, 2, 3, 4, requires_grad=True)
    value = matching_log_prob(prediction, torch.zeros(1, 2, 3, 4), torch.ones(1), form="code")
    value.sum().backward()
    assert value.item() == 0
    assert prediction.grad is not None
    assert bool(prediction.grad.isfinite().all())


def test_shapes_are_checked() -> None:
    prediction, velocity, times, credit = _draw((3, 4))
    with pytest.raises(ValueError, match=r"velocity, times: expected shapes \(4, 2, 3, 4\) and \(4,\)"):
        matching_log_prob(prediction, velocity, times[:2], credit, form="paper")
    with pytest.raises(ValueError, match=r"credit: expected shape \(4, 3, 4\) of positions, got \(4,\)"):
        matching_log_prob(prediction, velocity, times, times, form="paper")
