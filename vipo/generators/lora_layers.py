"""The layers of a LoRA file in any naming: how strong each is, and those that are held twice."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from vipo.generators.base import GeneratorError

_DOWN = re.compile(
    r"(?P<layer>.+?)(?P<end>\.lora_A(\.default)?\.weight|[._]lora(_linear_layer|[12])?[._]down\.weight)\Z"
)
_ALPHA = ".alpha"
# A name that begins so says already how it is to be converted; others say it by their alpha too.
_PREFIXES = ("diffusion_model.", "base_model.model.")
# Z-Image's layers under its original names, with what they are in diffusers.
_PARTS = MappingProxyType({"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out_0",)})
_ORIGINAL = re.compile(r"(?P<block>.+_attention)_(?P<layer>qkv|out)\Z")
# Of two factorizations of one product in bf16.
_ROUNDING = 1e-2


def in_weights(file: Path, tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """A LoRA whose alpha is in its weights: conversions lose it in places, and add some layers at that of others.

    Args:
        file: for the message.
        tensors: of the file; returned as they are where none is an alpha.
        prefix: which names of diffusers begin with.

    Returns:
        The same product at strength 1. Where conversions ask for an alpha it is the rank.

    Raises:
        GeneratorError: an alpha is no number, or belongs to no layer.
    """
    alphas = {name for name in tensors if name.endswith(_ALPHA)}
    if not alphas:
        return tensors
    found = dict(tensors)
    for layer, down, up in _layers(tensors):
        alpha = layer + _ALPHA
        if alpha not in alphas:
            continue
        rank = len(tensors[down])
        for name in (down, up.replace(".weight", ".bias")):
            if name in tensors:
                found[name] = tensors[name] * (_number(file, alpha, tensors[alpha]) / rank)
        found[alpha] = torch.tensor(float(rank))
        if alpha.startswith((f"{prefix}.", *_PREFIXES)):
            del found[alpha]
    if lost := sorted(alphas - {layer + _ALPHA for layer, _, _ in _layers(tensors)}):
        raise GeneratorError(f"{file}: {lost[0]} is the strength of no layer of its LoRA; give the file without")
    return found


def held_once(file: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A LoRA without what it holds again under Z-Image's original names, which the stock pipeline passes over.

    Args:
        file: for the message.
        tensors: of the file; returned as they are where no layer is held twice.

    Raises:
        GeneratorError: both are not the same.
    """
    layers = {layer.replace(".", "_"): (layer, down, up) for layer, down, up in _layers(tensors)}
    found = dict(tensors)
    for flat, (layer, down, up) in layers.items():
        match = _ORIGINAL.match(flat)
        parts = [f"{match['block']}_{name}" for name in _PARTS[match["layer"]]] if match else []
        twice = [layers[name] for name in parts if name in layers]
        if not twice:
            continue
        one = _product(file, tensors, *layers[flat])
        other = torch.cat([_product(file, tensors, *named) for named in twice])
        if one.shape != other.shape or (one - other).norm() > _ROUNDING * other.norm():
            raise GeneratorError(
                f"{file}: holds a layer twice, as {down} and as {twice[0][1]}, and they are not the same; the stock "
                "pipeline takes the latter alone: give the file without the other"
            )
        for name in (down, up, layer + _ALPHA):
            found.pop(name, None)
    return found if len(found) < len(tensors) else tensors


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Of each layer its name, and those of its two matrices."""
    for name in tensors:
        if match := _DOWN.match(name):
            up = match["end"].replace("lora_A", "lora_B").replace("down", "up")
            yield match["layer"], name, match["layer"] + up


def _product(file: Path, tensors: Mapping[str, Tensor], layer: str, down: str, up: str) -> Tensor:
    if up not in tensors:
        raise GeneratorError(f"{file}: holds {down} without {up}")
    product = tensors[up].float() @ tensors[down].float()
    alpha = layer + _ALPHA
    return product if alpha not in tensors else product * (_number(file, alpha, tensors[alpha]) / len(tensors[down]))


def _number(file: Path, name: str, value: Tensor) -> float:
    if value.numel() != 1 or not torch.isfinite(value).all():
        raise GeneratorError(f"{file}: {name} is no number")
    return float(value)
