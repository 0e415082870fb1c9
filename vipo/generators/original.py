"""Weights under the names of a family's original repository, which ComfyUI and others read and write.

One map serves both ways: a list of rules of the family (`vipo.generators.original_names`). Where the original has one
layer for several of ours, their rows are put below each other; where it has the halves of a modulation in the other
order, they change places. Both are exact for LoRA too: the product of its two matrices is what the rule would make of
the products.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vipo.errors import VipoError

PREFIX = "diffusion_model."
"""What begins the names of a LoRA file that ComfyUI, ai-toolkit and diffusers read by the original names."""

_SIDES = ("lora_A", "lora_B")


class NamesError(VipoError):
    """Weights that have no place under the original names; the message names the layer."""


@dataclass(frozen=True)
class Rule:
    """Where layers of one kind are in the original.

    Attributes:
        pattern: of a whole layer's or parameter's name, without ``.weight`` and ``.bias``.
        template: its original name, with the pattern's groups.
        part: which of the rows of the original layer it is, from 0; None: all.
        turned: whether the halves of its rows change places.
        weight: what the original calls its ``weight``.
    """

    pattern: str
    template: str
    part: int | None = None
    turned: bool = False
    weight: str = "weight"


def joined(pattern: str, parts: tuple[str, ...], template: str) -> Iterator[Rule]:
    """Several layers, ``<pattern><part>``, whose rows are one layer of the original."""
    for number, part in enumerate(parts):
        yield Rule(pattern + part, template, part=number)


@dataclass(frozen=True)
class Place:
    """Where one layer is in the original: its name, which rows of it, and how."""

    name: str
    rule: Rule


def place_of(layer: str, rules: Iterable[Rule]) -> Place:
    """The place of a layer by the first rule whose pattern it has.

    Raises:
        NamesError: no rule has it.
    """
    for rule in rules:
        if match := re.fullmatch(rule.pattern, layer):
            return Place(match.expand(rule.template), rule)
    raise NamesError(f"{layer}: has no name in the original repository's layout, and no place in its files")


def original_state(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """A network's whole state under the original names.

    Args:
        state: tensors by their names in diffusers.
        rules: of the family.

    Raises:
        NamesError: a tensor has no place, or a part of a joined layer is missing.
    """
    parts: dict[str, dict[int | None, Tensor]] = {}
    for key, value in state.items():
        target, rule = _target(key, rules)
        parts.setdefault(target, {})[rule.part] = _turned(value) if rule.turned else value
    return {name: _joined(name, pieces) for name, pieces in parts.items()}


def state_of_original(
    original: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], rules: Sequence[Rule]
) -> dict[str, Tensor]:
    """A network's whole state of what `original_state` made of it; parts of a joined layer are views of it.

    Args:
        original: tensors by their original names, of the shapes that `original_state` gives; others are left alone.
        shapes: of each tensor of the network, by its name in diffusers.
        rules: of the family.

    Raises:
        NamesError: a tensor has no place.
    """
    parts: dict[str, list[tuple[int, str, Rule]]] = {}
    for key in shapes:
        target, rule = _target(key, rules)
        parts.setdefault(target, []).append((rule.part or 0, key, rule))
    found: dict[str, Tensor] = {}
    for name, pieces in parts.items():
        top = 0
        for _, key, rule in sorted(pieces, key=lambda piece: piece[0]):
            value = original[name]
            if rule.part is not None:
                value = value[top : top + shapes[key][0]]
                top += len(value)
            found[key] = _turned(value) if rule.turned else value
    return found


def original_lora(
    layers: Mapping[str, Tensor], rows: Mapping[str, int], rules: Sequence[Rule]
) -> tuple[dict[str, Tensor], int]:
    """LoRA weights under the original names.

    Where the original has one layer for several of ours, the new A has all their A below each other and the new B
    their B along its diagonal: the same product, at the sum of the ranks.

    Args:
        layers: ``<layer>.lora_A.weight`` ``(r, in, ...)`` and ``<layer>.lora_B.weight`` ``(out, r, ...)``, the scale in
            B.
        rows: ``out`` of every layer of the network, adapted or not.
        rules: of the family.

    Returns:
        Tensors whose names begin with `PREFIX`, and how many layers of ours they hold.

    Raises:
        NamesError: a layer has no place, or is no pair.
    """
    pairs: dict[str, dict[int | None, tuple[str, Tensor, Tensor]]] = {}
    names = sorted({key.rsplit(".", 2)[0] for key in layers})
    for layer in names:
        place = place_of(layer, rules)
        down, up = (layers.get(f"{layer}.{side}.weight") for side in _SIDES)
        if down is None or up is None:
            raise NamesError(f"{layer}: its LoRA weights are no pair of lora_A and lora_B")
        pairs.setdefault(place.name, {})[place.rule.part] = layer, down, _turned(up) if place.rule.turned else up
    found: dict[str, Tensor] = {}
    for name, pieces in pairs.items():
        down, up = _stacked(name, pieces, rows, rules)
        found |= {f"{PREFIX}{name}.lora_A.weight": down, f"{PREFIX}{name}.lora_B.weight": up}
    return found, len(names)


def _target(key: str, rules: Sequence[Rule]) -> tuple[str, Rule]:
    """The original name of a tensor, and the rule that says so."""
    layer, _, kind = key.rpartition(".")
    layer, kind = (layer, kind) if kind in ("weight", "bias") else (key, "")
    place = place_of(layer, rules)
    named = place.rule.weight if kind == "weight" else kind
    return (f"{place.name}.{named}" if named else place.name), place.rule


def _turned(value: Tensor) -> Tensor:
    first, second = value.chunk(2, dim=0)
    return torch.cat([second, first])


def _joined(name: str, pieces: Mapping[int | None, Tensor]) -> Tensor:
    if None in pieces:
        return pieces[None].contiguous()
    found = [pieces[number] for number in range(max(key or 0 for key in pieces) + 1) if number in pieces]
    if len(found) != 1 + max(key or 0 for key in pieces):
        raise NamesError(f"{name}: a part of this layer of the original is missing")
    return torch.cat(found)


def _stacked(
    name: str,
    pieces: Mapping[int | None, tuple[str, Tensor, Tensor]],
    rows: Mapping[str, int],
    rules: Sequence[Rule],
) -> tuple[Tensor, Tensor]:
    if None in pieces:
        _, down, up = pieces[None]
        return down.contiguous(), up.contiguous()
    # All parts of that layer, of which training may have adapted some only.
    every = sorted(
        (place.rule.part or 0, layer) for layer in rows if (place := _placed(layer, rules)) and place.name == name
    )
    ordered = sorted(pieces.items(), key=lambda item: item[0] or 0)
    down = torch.cat([pair[1] for _, pair in ordered])
    up = down.new_zeros(sum(rows[layer] for _, layer in every), len(down))
    top, left = 0, 0
    for part, layer in every:
        if part in pieces:
            block = pieces[part][2]
            up[top : top + len(block), left : left + block.shape[1]] = block
            left += block.shape[1]
        top += rows[layer]
    return down, up


def _placed(layer: str, rules: Sequence[Rule]) -> Place | None:
    try:
        return place_of(layer, rules)
    except NamesError:
        return None
