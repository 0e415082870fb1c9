"""A generator without weights: its parts have shapes and no data, so that what a call keeps and computes is counted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from vipo.config.generator import DEFAULT_ATTENTION, GeneratorConfig
from vipo.config.training import LoraConfig
from vipo.generators.base import NEGATIVE, GeneratorError
from vipo.generators.configured import resolve_class
from vipo.generators.parts import part_without_weights
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.sharded import blocks
from vipo.generators.tiles import check_tiles

# What a family's conditioning has of a prompt as a whole, not of its tokens.
_POOLED = frozenset({"pooled_projections", "text_embeds"})


def outline(
    config: GeneratorConfig, root: Path, mode: FakeTensorMode, lora: LoraConfig | None, *, cast: bool = False
) -> PipelineGenerator:
    """The policy that a run trains, of the checkpoint's configurations alone; its tensors are `mode`'s.

    Args:
        config: its device is not asked for: shapes are the same on all.
        root: repository root, for relative paths.
        mode: that calls are made in.
        lora: what is trained; None: all weights.
        cast: whether the blocks' weights are bf16, as those of a sharded network are once they are gathered.

    Raises:
        GeneratorError: the configurations cannot be read, or the adapter is no `PipelineGenerator`.
    """
    adapter = resolve_class(config)
    if not issubclass(adapter, PipelineGenerator):
        raise GeneratorError(f"generator.family {config.family!r}: only a PipelineGenerator can be planned")
    # A family's own loading, but for the weights.
    without: type[PipelineGenerator] = type(adapter.__name__, (adapter,), {"load_parts": classmethod(_shapes)})
    # By PyTorch's own kernels, which there are for shapes alone.
    plain = {"device": "meta", "attention": DEFAULT_ATTENTION, "compile": "none"}
    generator = without.load(config.model_copy(update=plain), root)
    check_tiles(generator, config)
    if lora is None:
        generator.train_weights()
    else:
        generator.add_lora(lora, 0)
    if cast:
        for module in blocks(generator.network):
            # All of it, as FSDP2 does; diffusers' own `to` warns of parts that it would keep.
            nn.Module.to(module, torch.bfloat16)
    generator.read_no_values(one_time=False)
    generator.config, generator.device = config.model_copy(update={"device": "cpu"}), torch.device("cpu")
    with mode:
        for module in (generator.network, generator.vae):
            without_data(module)
        for name, value in vars(generator).items():
            if name not in ("network", "vae"):
                setattr(generator, name, tree_map_only(Tensor, _empty, value))
    return generator


def _shapes(
    cls: type[PipelineGenerator], config: GeneratorConfig, root: Path, location: Path | str, kinds: Mapping[str, Any]
) -> list[Any]:
    return [part_without_weights(kind, location, part, config, torch.device("meta")) for part, kind in kinds.items()]


def without_data(module: nn.Module) -> None:
    """Exchange a module's tensors for such as the mode makes that is on."""
    # Not by `Module.to`, which cannot exchange a parameter that something refers to weakly.
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            setattr(each, name, nn.Parameter(_empty(parameter), requires_grad=parameter.requires_grad))
        for name, buffer in each.named_buffers(recurse=False):
            setattr(each, name, _empty(buffer))


def _empty(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype)


def longest_conditioning(
    generator: PipelineGenerator, root: Path, batch: int, mode: FakeTensorMode
) -> dict[str, Tensor]:
    """Conditioning of a batch of the longest prompts.

    Masks hold data, for adapters read lengths off them.

    Args:
        generator: see `outline`.
        root: repository root.
        batch: prompts.
        mode: the outline's.
    """
    config, kind = generator.config, type(generator)
    shapes = conditioning_shapes(kind, config, root)
    given = {name: torch.ones(batch, *shapes[name]) for name in kind.masks}
    with mode:
        given |= {name: torch.empty(batch, *shape) for name, shape in shapes.items() if name not in given}
    guided = kind.guides and config.guidance_scale > kind.neutral_guidance
    return given | ({NEGATIVE + name: value for name, value in given.items()} if guided else {})


def conditioning_shapes(
    kind: type[PipelineGenerator], config: GeneratorConfig, root: Path
) -> dict[str, tuple[int, ...]]:
    """Shapes of the longest prompt's conditioning, by name, masks among them.

    Args:
        kind: the adapter.
        config: section `generator`.
        root: repository root.
    """
    widths, lengths = kind.conditioning_widths(config, root), kind.conditioning_lengths(config, root)
    tokens = {name: lengths.get(name, config.max_sequence_length) for name in (*widths, *kind.masks)}
    shapes: dict[str, tuple[int, ...]] = {name: (tokens[name],) for name in kind.masks}
    return shapes | {name: (width,) if name in _POOLED else (tokens[name], width) for name, width in widths.items()}
