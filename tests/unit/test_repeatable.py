"""What has a repeatable gradient on a GPU, against PyTorch's own; that it acts there is `test_rehearsal`'s."""

import pytest
import torch
import torch.nn.functional as F

from vipo.repeatable import RepeatableGradients, SampledBetween, reflected


@pytest.mark.parametrize(
    ("shape", "pad"), [((2, 5, 6), (2, 1)), ((2, 3, 4, 5), (1, 3, 2, 0)), ((1, 2, 3, 4, 5), (1, 1, 2, 3, 0, 0))]
)
def test_padding_by_reflection(shape: tuple[int, ...], pad: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted, found = F.pad(values, pad, mode="reflect"), reflected(values, pad)
    assert torch.equal(found, wanted)
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((padded * weights).sum(), values)[0] for padded in (wanted, found)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError):
        reflected(values, (shape[-1], 0))


def test_sampling_between_pixels() -> None:
    """At pixels, between them, on the edge, and beyond it, where several places share a pixel."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    grid = torch.rand(2, 6, 7, 2, generator=generator, dtype=torch.float64) * 3 - 1.5
    grid[:, 0, :4] = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 1.0], [0.5, -1.0 / 3]], dtype=torch.float64)
    wanted, found = F.grid_sample(values, grid, align_corners=True), SampledBetween.apply(values, grid)
    assert torch.equal(found, wanted)
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((sampled * weights).sum(), values)[0] for sampled in (wanted, found)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_a_cpu_s_own_are_left() -> None:
    values = torch.ones(1, 1, 3, 3, requires_grad=True)
    with RepeatableGradients():
        assert "ReflectionPad" in type(F.pad(values, (1, 1, 1, 1), mode="reflect").grad_fn).__name__
        assert (
            "GridSampler" in type(F.grid_sample(values, torch.zeros(1, 1, 1, 2), align_corners=True).grad_fn).__name__
        )
