"""Every generator of `configs/generator/` at its real size, without weights to read: ``unloaded:NAME`` is its family.

Its parts are made on the device from their configurations, and its prompts are the longest there are, of random
numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.random_weights import random_conditioning
from benchmarks.gpu.size import run_overrides, update_of
from benchmarks.plan_table import GENERATORS, write_checkpoint
from vipo.config.compose import load_generator_sections
from vipo.config.generator import GeneratorConfig
from vipo.generators.configured import resolve_class
from vipo.generators.parts import part_without_weights
from vipo.generators.pipeline import PipelineGenerator

_DINO = "benchmarks.gpu.random_weights:dinov2_large"


def __getattr__(name: str) -> Any:
    if name not in GENERATORS:
        raise AttributeError(name)
    adapter = resolve_class(load_generator_sections([f"generator={name}"])[0])
    own = {"load_parts": classmethod(_made), "encode_prompts": classmethod(random_conditioning)}
    return type(adapter.__name__, (adapter,), own)


def unloaded_overrides(name: str, folder: Path, device: str) -> list[str]:
    """Hydra overrides of a run of LoRA on two samples, one in a call; what it reads is written into `folder`."""
    (folder / "checkpoint").mkdir()
    write_checkpoint(name, folder / "checkpoint")
    noise = "DDIM" in GENERATORS[name].scheduler["_class_name"]
    return run_overrides(
        f"{__name__}:{name}",
        folder / "checkpoint",
        folder,
        device,
        (
            f"generator={name}",
            *update_of(1, 1),
            "training.group_size=2",
            "training.lora={rank: 16, alpha: 16}",
            "training.gradient_checkpointing=true",
            "generator.weights=bf16",
            "generator.precision=bf16",
            f"perception.backbone='{_DINO}'",
            "sampling.steps=3",
            *(("sampling.transition=ddim",) if noise else ()),
            # Its guidance divides by the prediction's norm, and a ghost's is zero.
            *(("generator.guidance_scale=1",) if name == "qwen_image" else ()),
        ),
    )


def _made(
    cls: type[PipelineGenerator], config: GeneratorConfig, root: Path, location: Path | str, kinds: Mapping[str, Any]
) -> list[Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            part_without_weights(kind, location, part, config, torch.device(config.device))
            for part, kind in kinds.items()
        ]
