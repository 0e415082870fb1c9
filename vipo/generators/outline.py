"""A generator without weights: its parts have shapes and no data, so that what a call keeps and computes is counted."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from vipo.config.generator import GeneratorConfig
from vipo.config.training import LoraConfig
from vipo.generators.base import NEGATIVE, GeneratorError, checkpoint_location, resolve_class
from vipo.generators.parts import load_part, model_index
from vipo.generators.pipeline import PipelineGenerator, hold_in_bf16

# What a family's conditioning has of a prompt as a whole, not of its tokens.
_POOLED = frozenset({"pooled_projections", "text_embeds"})


def outline(
    config: GeneratorConfig, root: Path, mode: FakeTensorMode, lora: LoraConfig | None, *, trained: bool = True
) -> PipelineGenerator:
    """The policy that a run trains, of the checkpoint's configurations alone; its tensors are `mode`'s.

    Args:
        config: its device is not asked for: shapes are the same on all.
        root: repository root, for relative paths.
        mode: that calls are made in.
        lora: what is trained; None: all weights.
        trained: whether anything is.

    Raises:
        GeneratorError: the configurations cannot be read, or the adapter is no `PipelineGenerator`.
    """
    adapter = resolve_class(config)
    if not issubclass(adapter, PipelineGenerator):
        raise GeneratorError(f"generator.family {config.family!r}: only a PipelineGenerator can be planned")
    adapter.check(config, root)
    location = checkpoint_location(config, root)
    parts = []
    for part, kind in adapter.part_classes(location, model_index(location, config.revision)).items():
        settings = load_part(kind.load_config, location, part, config, weights=False)
        with torch.device("meta"):
            parts.append(kind.from_config(settings))
    generator = adapter(config.model_copy(update={"device": "meta"}), *parts)
    if config.weights == "bf16":
        hold_in_bf16(generator.network)
    if trained and lora is not None:
        generator.add_lora(lora, 0)
    elif trained:
        generator.network.requires_grad_(True)
    generator.config, generator.device = config.model_copy(update={"device": "cpu"}), torch.device("cpu")
    with mode:
        for module in (generator.network, generator.vae):
            _without_data(module)
        for name, value in vars(generator).items():
            if name not in ("network", "vae"):
                setattr(generator, name, tree_map_only(Tensor, _empty, value))
    return generator


def _without_data(module: nn.Module) -> None:
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
    """Conditioning of a batch whose prompts are as long as can be; masks hold data, for adapters read lengths off them.

    Args:
        generator: see `outline`.
        root: repository root.
        batch: prompts.
        mode: the outline's.
    """
    config, kind = generator.config, type(generator)
    length, widths = config.max_sequence_length, kind.conditioning_widths(config, root)
    shapes = {name: (batch, width) if name in _POOLED else (batch, length, width) for name, width in widths.items()}
    given = {name: torch.ones(batch, length) for name in kind.masks}
    with mode:
        given |= {name: torch.empty(shape) for name, shape in shapes.items()}
    guided = kind.guides and config.guidance_scale > kind.neutral_guidance
    return given | ({NEGATIVE + name: value for name, value in given.items()} if guided else {})
