"""A network that is about to be sharded: what of it is gathered at a time, and loading it, so that no device, and one
process of a node, ever holds the whole of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import Generator
from vipo.generators.configured import load_generator, resolve_class
from vipo.generators.parts import load_part, part_without_weights
from vipo.generators.pipeline import PipelineGenerator


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a sharded network that are gathered one after the other, inner ones first: the blocks that diffusers
    keeps whole on one device, or else those that it compiles; where none is named, the network itself."""
    named = (getattr(network, kind, None) for kind in ("_no_split_modules", "_repeated_blocks"))
    names = set(next(filter(None, named), ()))
    found = [module for module in reversed(list(network.modules())) if type(module).__name__ in names]
    return found or [network]


def load_to_shard(config: GeneratorConfig, root: Path, *, whole: bool) -> Generator:
    """The configured generator with its network in main memory, or without its weights; the rest is on its device.

    An adapter that is no `PipelineGenerator` loads the whole network on its device.

    Args:
        config: section `generator`.
        root: repository root, for relative paths.
        whole: read the weights; else parameters are on PyTorch's meta device, and buffers as the class makes them.

    Raises:
        GeneratorError: as `load_generator`.
    """
    adapter = resolve_class(config)
    if not issubclass(adapter, PipelineGenerator):
        return load_generator(config, root)
    changed: dict[str, Any] = {"placed": _as_it_is}
    if not whole:
        changed["load_parts"] = classmethod(_without_weights)
    return load_generator(config, root, type(adapter.__name__, (adapter,), changed))


def _as_it_is(_: PipelineGenerator, network: nn.Module) -> nn.Module:
    return network


def _without_weights(
    cls: type[PipelineGenerator], config: GeneratorConfig, root: Path, location: Path | str, kinds: Mapping[str, Any]
) -> list[Any]:
    return [
        load_part(kind.from_pretrained, location, part, config)
        if part == "vae"
        else part_without_weights(kind, location, part, config, init_empty_weights(include_buffers=False))
        for part, kind in kinds.items()
    ]
