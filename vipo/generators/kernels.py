"""Which kernels a network computes with: attention backends of diffusers, and blocks that PyTorch compiles."""

import logging
from collections import Counter

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import attention_backend
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import nn

from vipo.config.generator import DEFAULT_ATTENTION, GeneratorConfig
from vipo.generators.applied import not_applied
from vipo.generators.base import GeneratorError

log = logging.getLogger(__name__)

# Graphs of one block's code: kinds of its blocks (Stable Diffusion 3 has three) x with and without gradients, of the
# first block and of others x with and without an adapter x batches of rollout, update and evaluation.
_GRAPHS = 96

# Of diffusers, where the environment names no backend.
_STOCK = "native"

# Each operation rounds as it does outside a compiled block, and no kernel is chosen by timing it: a block has the same
# bits with gradients and without, and in every process.
EXACT = {"emulate_precision_casts": True, "deterministic": True}


def use_kernels(network: nn.Module, config: GeneratorConfig) -> None:
    """Let a network compute as `config.attention` and `config.compile` say.

    Nothing is compiled before the first call, so that an adapter may be added and rows given away (FSDP2) in between.

    Args:
        network: one of diffusers, or one that holds several; on the meta device nothing but the refusals comes of it.

    Raises:
        GeneratorError: the network would go on as before, or the environment chooses a backend that nothing records.
    """
    if config.attention == DEFAULT_ATTENTION and DIFFUSERS_ATTN_BACKEND != _STOCK:
        raise GeneratorError(
            f"DIFFUSERS_ATTN_BACKEND={DIFFUSERS_ATTN_BACKEND}: no run records what the environment chooses; "
            "unset it, and set generator.attention"
        )
    models = [module for module in network.modules() if isinstance(module, ModelMixin)]
    if config.attention != DEFAULT_ATTENTION:
        for model in models:
            _dispatch(model, config)
    if config.compile == "blocks":
        for block in (block for model in models for block in repeated_blocks(model)):
            block.compile(fullgraph=True, dynamic=False, options=EXACT)
        # Beyond its limit the compiler gives up.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, _GRAPHS)
    if missing := not_applied(network, config):
        raise GeneratorError(missing)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers compiles; of a class that names none, of those that it keeps whole the ones that
    occur more than once."""
    names = set(getattr(model, "_repeated_blocks", None) or ())
    if not names:
        counts = Counter(type(module).__name__ for module in model.modules())
        names = {name for name in getattr(model, "_no_split_modules", None) or () if counts[name] > 1}
    return [module for module in model.modules() if type(module).__name__ in names]


def _dispatch(model: ModelMixin, config: GeneratorConfig) -> None:
    # The setter sets it for the process as well, which this block undoes.
    with attention_backend(config.attention):
        model.set_attention_backend(config.attention)
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    others = Counter(type(each).__name__ for each in processors if not hasattr(each, "_attention_backend"))
    if others and others.total() < len(processors):
        log.info(
            "generator.attention %s: not of %s, which call PyTorch's own",
            config.attention,
            ", ".join(f"{count} layers ({name})" for name, count in sorted(others.items())),
        )
