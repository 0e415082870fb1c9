"""A generator of 40 weights whose every gradient can be checked by hand: a convolution, a decoder that is a formula."""

import torch
from torch import Tensor, nn

from vipo.generators.base import Conditioning, Generator


class ToyNetwork(nn.Module):
    """``tanh(conv(x)) + time * drift + shift``."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(0.3 * torch.randn(channels, channels, 3, 3, generator=draw))
        self.bias = nn.Parameter(0.3 * torch.randn(channels, generator=draw))
        self.drift = nn.Parameter(0.3 * torch.randn(channels, generator=draw))

    def forward(self, latents: Tensor, time: Tensor, shift: Tensor) -> Tensor:
        mixed = nn.functional.conv2d(latents, self.kernel, self.bias, padding=1)
        return torch.tanh(mixed) + time[:, None, None, None] * self.drift[:, None, None] + shift[:, None, None, None]


class ToyGenerator(Generator):
    """Latents ``(2, 4, 4)``, pictures ``(3, 8, 8)``."""

    network_folder = "network"

    def __init__(self, precision: str = "fp32") -> None:
        self.latent_shape = (2, 4, 4)
        self.device = torch.device("cpu")
        settings = {"precision": precision, "family": "toy", "sample_shape": (3, 8, 8), "device": "cpu"}
        self.config = type("Config", (), settings)()
        self.network = ToyNetwork()

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(latents, time, conditioning["shift"])

    def decode(self, latents: Tensor) -> Tensor:
        colours = torch.tensor([[1.0, 0.2], [-0.3, 0.8], [0.1, -0.9]])
        pictures = torch.einsum("kc,bchw->bkhw", colours, latents)
        return torch.sigmoid(nn.functional.interpolate(pictures, scale_factor=2, mode="nearest"))

    def _absent(self, *_: object, **__: object) -> None:
        raise NotImplementedError

    load = encode_prompts = add_lora = save_network = load_network = _absent


def left_redness(pictures: Tensor, prompts: object, metadata: object) -> Tensor:
    """A local, curved reward: how red the left half is."""
    left = pictures[..., : pictures.shape[-1] // 2]
    return (left[:, 0] - (left[:, 1] + left[:, 2]) / 2).square().mean(dim=(1, 2)) + left[:, 0].mean(dim=(1, 2))
