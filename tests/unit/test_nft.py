"""DiffusionNFT against explicit loops, the published code's formula written anew, and its closed-form gradient."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from vipo.objectives.advantages import group_advantages
from vipo.objectives.forward import noised, ramped_decay, velocity_kl
from vipo.objectives.nft import nft_loss, optimality

PLACES = [(3, 4), (2, 3, 4)]


def _draw(places: tuple[int, ...], batch: int = 3, channels: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, *places)
    clean, noise, old, change = (torch.randn(shape, generator=generator) for _ in range(4))
    times = torch.rand(batch, generator=generator)
    latents, velocity = noised(clean, noise, times)
    return {
        "clean": clean,
        "noise": noise,
        "latents": latents,
        "velocity": velocity,
        "times": times,
        "old": old,
        "new": (old + 0.3 * change).requires_grad_(),
        "good": torch.rand(batch, *places, generator=generator),
    }


def _loop(d: dict[str, Tensor], good: Tensor, beta: float, form: str, z: float) -> Tensor:
    """Element by element, in the published code's own space: x0 for form 'code'."""
    batch, channels, *places = d["new"].shape
    losses = []
    for row in range(batch):
        t = float(d["times"][row])

        def error(sign: int, row: int = row, t: float = t) -> Tensor:
            implicit = (1 - sign * beta) * d["old"][row] + sign * beta * d["new"][row]
            if form == "paper":
                return implicit - d["velocity"][row]
            return (d["latents"][row] - t * implicit) - d["clean"][row]

        errors = [error(1), error(-1)]
        sizes = [max(float(e.detach().double().abs().mean()), 1e-5) for e in errors]
        total = torch.zeros(())
        for place in itertools.product(range(channels), *(range(n) for n in places)):
            q = good[(row, *place[1:])] if good.ndim > 1 else good[row]
            for share, e, size in zip((q, 1 - q), errors, sizes, strict=True):
                total = total + share * e[place] ** 2 / (size if form == "code" else 1)
        scale = z / beta if form == "code" else 1
        losses.append(scale * total / (channels * math.prod(places)))
    return torch.stack(losses)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("scope", ["sample", "position"])
def test_loss_and_gradient_are_an_explicit_loop(places: tuple[int, ...], form: str, beta: float, scope: str) -> None:
    d = _draw(places)
    good = d["good"] if scope == "position" else d["good"].flatten(1)[:, 0]
    loss = nft_loss(d["new"], d["old"], d["velocity"], d["times"], good, beta=beta, form=form, z=5.0)
    expected = _loop(d, good, beta, form, 5.0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(value.mean(), d["new"])[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_without_credit_it_is_the_published_scalar_form() -> None:
    d = _draw((3, 4))
    advantages = torch.tensor([7.0, -1.0, 0.5])
    # As the public code has it, for one advantage a sample; b = .1, Z = 5.
    r = torch.clamp((torch.clamp(advantages, -5, 5) / 5) / 2 + 0.5, 0, 1)
    t = d["times"].view(-1, 1, 1, 1)
    halves = []
    for policy in (0.1 * d["new"] + 0.9 * d["old"], 1.1 * d["old"] - 0.1 * d["new"]):
        difference = d["latents"] - t * policy - d["clean"]
        factor = difference.detach().double().abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
        halves.append((difference**2 / factor).mean(dim=(1, 2, 3)))
    published = ((r * halves[0] / 0.1 + (1 - r) * halves[1] / 0.1) * 5).mean().float()
    for credit in (torch.ones(3, 3, 4), None):
        placed = advantages if credit is None else advantages.view(-1, 1, 1) * credit
        good = optimality(placed, 5.0)
        loss = nft_loss(d["new"], d["old"], d["velocity"], d["times"], good, beta=0.1, form="code", z=5.0).mean()
        torch.testing.assert_close(loss, published, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(v, d["new"], retain_graph=True)[0] for v in (loss, published)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_gradient_is_the_closed_form(beta: float) -> None:
    d = _draw((2, 3, 4))
    loss = nft_loss(d["new"], d["old"], d["velocity"], d["times"], d["good"], beta=beta, form="paper", z=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), d["new"])
    q = d["good"].unsqueeze(1)
    with torch.no_grad():
        expected = 2 * beta * ((2 * q - 1) * (d["old"] - d["velocity"]) + beta * (d["new"] - d["old"]))
    torch.testing.assert_close(gradient, expected / (2 * 2 * 3 * 4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_equal_rewards_leave_the_pull_to_the_old_policy(beta: float) -> None:
    """q = .5 whatever the credit: the gradient is that of ``b^2 |v_theta - v_old|^2``, and none at the old policy."""
    d = _draw((3, 4))
    groups = torch.zeros(3, dtype=torch.int64)
    advantages = group_advantages({"r": torch.full((3,), 0.7)}, {"r": 1.0}, groups, 1e-4, 5).values
    good = optimality(advantages.reshape(-1, 1, 1) * d["good"], 5.0)
    assert good.unique().tolist() == [0.5]

    def gradient(new: Tensor, form: str) -> Tensor:
        new = new.detach().requires_grad_()
        loss = nft_loss(new, d["old"], d["velocity"], d["times"], good, beta=beta, form=form, z=5.0)
        return torch.autograd.grad(loss.sum(), new)[0]

    pull = 2 * beta**2 * (d["new"] - d["old"]).detach() / (2 * 3 * 4)
    torch.testing.assert_close(gradient(d["new"], "paper"), pull, rtol=1e-4, atol=1e-6)
    for form in ("paper", "code"):
        assert float(gradient(d["old"], form).abs().max()) < 1e-6


def test_one_element_by_hand() -> None:
    """v_old = 2, v_theta = 3, v = 1, q = .75: b = .5 gives v+ = 2.5 and v- = 1.5; x0 is off by t times as much."""
    new, old, velocity = (torch.full((1, 1, 1, 1), value) for value in (3.0, 2.0, 1.0))
    given = (new, old, velocity, torch.tensor([0.4]), torch.tensor([0.75]))
    paper = nft_loss(*given, beta=0.5, form="paper", z=5.0)
    assert float(paper) == pytest.approx(0.75 * 1.5**2 + 0.25 * 0.5**2)
    # Each half is e^2 / |e| = |e|.
    code = nft_loss(*given, beta=0.5, form="code", z=5.0)
    assert float(code) == pytest.approx((0.75 * 0.4 * 1.5 + 0.25 * 0.4 * 0.5) / 0.5 * 5)


def test_a_wholly_good_sample_with_b_of_1_is_pretraining() -> None:
    d = _draw((3, 4))
    loss = nft_loss(d["new"], d["old"], d["velocity"], d["times"], torch.ones(3), beta=1.0, form="paper", z=1.0)
    expected = (d["new"] - d["velocity"]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected)


def test_optimality_by_hand() -> None:
    values = optimality(torch.tensor([-9.0, -5.0, -2.5, 0.0, 1.0, 5.0, 9.0]), 5.0)
    assert values.tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.6, 1, 1])
    assert optimality(torch.tensor([0.5]), 1.0).tolist() == [0.75]
    with pytest.raises(ValueError, match="z: 0 must be above 0"):
        optimality(torch.zeros(1), 0)


def test_samples_may_be_permuted() -> None:
    d = _draw((3, 4))
    order = torch.tensor([2, 0, 1])
    given = [d[name] for name in ("new", "old", "velocity", "times", "good")]
    for form in ("paper", "code"):
        loss = nft_loss(*given, beta=0.1, form=form, z=5.0)
        permuted = nft_loss(*(value[order] for value in given), beta=0.1, form=form, z=5.0)
        torch.testing.assert_close(permuted, loss[order])


@pytest.mark.parametrize("form", ["paper", "code"])
def test_half_precision_predictions_are_summed_in_fp32(form: str) -> None:
    d = _draw((16, 16))
    new, old = (d[name].detach().bfloat16() for name in ("new", "old"))
    given = (d["velocity"], d["times"], d["good"])
    loss = nft_loss(new, old, *given, beta=0.1, form=form, z=5.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nft_loss(new.float(), old.float(), *given, beta=0.1, form=form, z=5.0))


def test_the_old_policy_takes_no_gradient() -> None:
    d = _draw((3, 4))
    old = d["old"].requires_grad_()
    loss = nft_loss(d["new"], old, d["velocity"], d["times"], d["good"], beta=0.1, form="code", z=5.0)
    assert torch.autograd.grad(loss.sum(), old, allow_unused=True)[0] is None


def test_published_decays() -> None:
    """The public code's three types, and the anchor of AWM's."""
    assert [ramped_decay(step, flat=0, rate=0.0, hold=0.0) for step in (1, 500)] == [0, 0]
    ramp = [ramped_decay(step, flat=0, rate=0.001, hold=0.5) for step in (0, 1, 200, 500, 900)]
    assert ramp == pytest.approx([0, 0.001, 0.2, 0.5, 0.5])
    late = [ramped_decay(step, flat=75, rate=0.0075, hold=0.999) for step in (74, 75, 76, 200, 300)]
    assert late == pytest.approx([0, 0, 0.0075, 0.9375, 0.999])
    assert ramped_decay(1000, flat=0, rate=0.001, hold=0.3) == 0.3


def test_noised_by_hand() -> None:
    latents, velocity = noised(torch.full((2, 1, 1, 1), 4.0), torch.full((2, 1, 1, 1), -2.0), torch.tensor([0.25, 1.0]))
    assert latents.flatten().tolist() == [2.5, -2]
    assert velocity.flatten().tolist() == [-6, -6]


def test_velocity_kl_is_a_mean_square() -> None:
    d = _draw((2, 3, 4))
    divergence = velocity_kl(d["new"], d["old"])
    expected = [float(((d["new"][row].detach() - d["old"][row]) ** 2).mean()) for row in range(3)]
    assert divergence.tolist() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(divergence.sum(), d["new"])
    torch.testing.assert_close(gradient, 2 * (d["new"] - d["old"]).detach() / (2 * 2 * 3 * 4))


def test_shapes_are_checked() -> None:
    d = _draw((3, 4))
    with pytest.raises(ValueError, match=r"old_prediction: expected shape \(3, 2, 3, 4\) of prediction, got \(3, 2\)"):
        nft_loss(d["new"], torch.zeros(3, 2), d["velocity"], d["times"], d["good"], beta=1, form="paper", z=1)
    with pytest.raises(ValueError, match=r"\(3,\) or \(3, 3, 4\), got \(3,\) and \(2,\)"):
        nft_loss(d["new"], d["old"], d["velocity"], d["times"], torch.zeros(2), beta=1, form="paper", z=1)
    with pytest.raises(ValueError, match=r"noise, times: expected shapes \(3, 2, 3, 4\) and \(3,\) of clean"):
        noised(d["clean"], d["noise"], torch.zeros(2))
    with pytest.raises(ValueError, match=r"other: expected shape \(3, 2, 3, 4\) of prediction, got \(1,\)"):
        velocity_kl(d["new"], torch.zeros(1))
