"""Padding by reflection made of slices, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from vipo.generators.reflection import RepeatableReflection


@pytest.mark.parametrize(
    ("shape", "pad"), [((2, 5, 6), (2, 1)), ((2, 3, 4, 5), (1, 3, 2, 0)), ((1, 2, 3, 4, 5), (1, 1, 2, 3, 0, 0))]
)
def test_it_is_pytorchs_own(shape: tuple[int, ...], pad: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = F.pad(values, pad, mode="reflect")
    with RepeatableReflection():
        found = F.pad(values, pad, mode="reflect")
    assert torch.equal(found, wanted)
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((padded * weights).sum(), values)[0] for padded in (wanted, found)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    assert "Reflection" not in type(found.grad_fn).__name__


def test_other_padding_is_left_as_it_is() -> None:
    values = torch.arange(6.0).view(1, 2, 3)
    convolution = torch.nn.Conv1d(2, 1, 3, padding=1, padding_mode="reflect")
    plain = convolution(values)
    with RepeatableReflection():
        assert torch.equal(F.pad(values, (1, 2)), torch.tensor([[[0.0, 0, 1, 2, 0, 0], [0, 3, 4, 5, 0, 0]]]))
        assert torch.equal(F.pad(values, (1, 0), value=7.0)[0, :, 0], torch.tensor([7.0, 7.0]))
        assert torch.equal(convolution(values), plain)
        with pytest.raises(RuntimeError):
            F.pad(values, (3, 0), mode="reflect")
