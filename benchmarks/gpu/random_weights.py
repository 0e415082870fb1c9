"""Generators and a backbone of real size with random weights, made on the device: what they cost needs no checkpoint.

They are extensions by import path like any user's: ``generator.family=benchmarks.gpu.random_weights:RandomFlux`` with
``generator.path`` a folder that `write_layout` made, which holds the parts' configurations and no weights.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import timm
import torch
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.config.perception import PerceptionConfig
from vipo.generators.base import NEGATIVE
from vipo.generators.flux import FluxGenerator
from vipo.generators.outline import conditioning_shapes
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.qwen_image_21 import QwenImage21Generator
from vipo.generators.stable_diffusion_3 import StableDiffusion3Generator
from vipo.generators.wan import WanGenerator
from vipo.perception.backbone import Backbone
from vipo.perception.loading import TimmFeatures
from vipo.rounding import hold_in_bf16


def write_layout(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> Path:
    """A checkpoint's configurations without its weights.

    Args:
        folder: to be made.
        parts: by subfolder, the configuration of each part; what it leaves out is the class's default.
    """
    for part, settings in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(settings))
    (folder / "model_index.json").write_text("{}")
    return folder


class RandomWeights(PipelineGenerator):
    """A family whose parts are made on the device instead of loaded, and whose prompts are random embeddings."""

    autoencoder_class: ClassVar[Any]

    @classmethod
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        """Nothing: the layout is what `write_layout` makes."""

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> Self:
        kinds = {cls.network_folder: cls.network_class, "vae": cls.autoencoders[cls.autoencoder_class]}
        parts = []
        for part, kind in kinds.items():
            settings = json.loads((root / config.path / part / "config.json").read_text())
            with torch.random.fork_rng(), torch.device(config.device):
                torch.manual_seed(0)
                parts.append(kind(**settings))
        network, vae = parts
        # As a checkpoint's is: its norms and tables stay fp32, and decide what its blocks add up in.
        if config.weights == "bf16":
            hold_in_bf16(network)
        return cls(config, network, vae)

    @classmethod
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        return random_conditioning(cls, config, root, texts)


def random_conditioning(
    kind: type[PipelineGenerator], config: GeneratorConfig, root: Path, texts: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Conditioning of prompts, each as long as a prompt may be, of random numbers."""
    generator, shapes = torch.Generator().manual_seed(0), conditioning_shapes(kind, config, root)

    def drawn() -> dict[str, Tensor]:
        return {
            name: torch.ones(shape) if name in kind.masks else torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }

    negative = {NEGATIVE + name: value for name, value in drawn().items()} if kind.guides else {}
    return [drawn() | negative for _ in texts]


class RandomFlux(RandomWeights, FluxGenerator):
    """FLUX.1."""

    autoencoder_class: ClassVar[Any] = "AutoencoderKL"


class RandomWan(RandomWeights, WanGenerator):
    """Wan 2.1."""

    autoencoder_class: ClassVar[Any] = "AutoencoderKLWan"


class RandomStableDiffusion3(RandomWeights, StableDiffusion3Generator):
    """Stable Diffusion 3 and 3.5."""

    autoencoder_class: ClassVar[Any] = "AutoencoderKL"


class RandomQwenImage21(RandomWeights, QwenImage21Generator):
    """Qwen-Image 2.1."""

    autoencoder_class: ClassVar[Any] = "AutoencoderKLQwenImage21"


def dinov2_large(config: PerceptionConfig) -> Backbone:
    """DINOv2-large, the paper's backbone."""
    return _dinov2("vit_large_patch14_dinov2", config)


def dinov2_small(config: PerceptionConfig) -> Backbone:
    """DINOv2-small, for the test on a CPU."""
    return _dinov2("vit_small_patch14_dinov2", config)


def _dinov2(name: str, config: PerceptionConfig) -> Backbone:
    # A core takes seconds for the larger one, and every set-up makes it anew.
    with torch.random.fork_rng(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    return Backbone(
        TimmFeatures(model, len(model.blocks) - 1),
        feature_width=model.num_features,
        orientation="border",
        input_size=config.input_size or 518,
        stride=14,
    )
