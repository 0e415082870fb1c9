"""What raises on a GPU under deterministic algorithms, found without one: no such operation is called."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vipo.config.compose import load_config, repository_root
from vipo.rewards.pixels import bicubic, clip_pixels, padded_pixels
from vipo.training.setup import set_up
from vipo.training.update import update

# PyTorch has no deterministic kernel of these on CUDA (`torch.use_deterministic_algorithms`); those that its own
# functions replace by others on CUDA are not among them.
_RAISES = {
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward"),
    *(
        "avg_pool3d_backward",
        "max_pool3d_with_indices_backward",
        "fractional_max_pool2d_backward",
        "fractional_max_pool3d_backward",
    ),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
    *("upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward", "_upsample_bilinear2d_aa_backward"),
    *("upsample_linear1d_backward", "upsample_trilinear3d_backward", "grid_sampler_2d_backward"),
    *("grid_sampler_3d_backward", "max_unpool2d", "max_unpool3d", "nll_loss2d_forward", "_ctc_loss_backward"),
    *("histc", "put_", "kthvalue", "median", "nanmedian", "index_reduce", "scatter_reduce"),
}


class Refused(TorchDispatchMode):
    """Inside, such an operation raises as it would on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        with_indices = name in ("median", "nanmedian") and len(args) > 1
        if {name, name.removesuffix("_")} & _RAISES and (with_indices or "median" not in name):
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


def test_the_mode_refuses_what_it_is_for() -> None:
    values = torch.rand(1, 3, 8, 8, requires_grad=True)
    with Refused():
        assert values.median() > 0
        with pytest.raises(RuntimeError, match="median does not"):
            values.median(dim=-1)
        small = F.interpolate(values, size=(4, 4), mode="bicubic", antialias=True)
        with pytest.raises(RuntimeError, match="_upsample_bicubic2d_aa_backward does not"):
            small.sum().backward()


@pytest.mark.parametrize("arm", ["grpo", "vipo", "oracle"])
def test_an_update_calls_none(arm: str, prepared: Path, tiny_overrides: list[str]) -> None:
    setup = set_up(load_config([*tiny_overrides, f"arm={arm}"]), repository_root(), prepared / "demo")
    with Refused():
        metrics = update(setup, 1)
    assert metrics["grad/norm"] > 0


@pytest.mark.parametrize("pixels", [partial(clip_pixels, size=28, nearest=True), partial(padded_pixels, size=28)])
def test_a_gradient_by_pictures_calls_none(pixels: Any) -> None:
    images = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    with Refused():
        pixels(images).square().sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


@pytest.mark.parametrize("size", [(28, 28), (37, 50), (11, 90), (64, 20)])
def test_the_gradient_of_the_resize_is_interpolates(size: tuple[int, int]) -> None:
    drawn = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 37, 50, generator=drawn).double()
    pull = torch.randn(2, 3, *size, generator=drawn).double()

    def gradient(resized: Any) -> tuple[Tensor, Tensor]:
        own = images.clone().requires_grad_(True)
        found = resized(own)
        (pulled,) = torch.autograd.grad(found, own, pull)
        return found, pulled

    found, pulled = gradient(lambda own: bicubic(own, *size))
    expected, theirs = gradient(
        lambda own: F.interpolate(own, size=size, mode="bicubic", antialias=True, align_corners=False)
    )
    assert torch.equal(found, expected)
    torch.testing.assert_close(pulled, theirs, atol=1e-6, rtol=1e-6)
