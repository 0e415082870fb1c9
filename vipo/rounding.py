"""Weights that are held in bf16."""

import torch
from torch import nn


def hold_in_bf16(network: nn.Module) -> None:
    """Round in place the weights that autocast would round at every call: those of linear layers and convolutions.

    Norms, embeddings and whatever else a network adds or multiplies by stay fp32, so that its predictions under
    autocast keep their bits. A layer at a time: main memory never holds both copies.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.to(torch.bfloat16)
