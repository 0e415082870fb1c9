"""A run's weights as one file under a family's original names, which ComfyUI reads, and others that know these."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.config.run import Config
from vipo.generators.base import checkpoint_location, resolve_class
from vipo.generators.lora import LORA_FILE
from vipo.generators.parts import load_part
from vipo.generators.pipeline import PipelineGenerator
from vipo.handover.original import NamesError, original_lora, original_state
from vipo.handover.original_names import NAMES, REFUSED


@dataclass(frozen=True)
class ComfyFile:
    """What was written.

    Attributes:
        name: of the file.
        folder: of ComfyUI that it belongs into, below its own.
        held: layers of ours that it holds under original names: those that were adapted, or of all weights every
            tensor; none is left out, or nothing is written.
        original: layers (LoRA) or tensors of the original that they make.
    """

    name: str
    folder: str
    held: int
    original: int


def check_comfyui(config: Config) -> None:
    """Refuse a generator whose original names are not known, before anything is written.

    Raises:
        NamesError: naming the family and why.
    """
    _rules(config)


def write_comfyui(config: Config, weights: Path, folder: Path, root: Path) -> ComfyFile:
    """Write ``<experiment>-<run>.safetensors``: the trained network, or its LoRA weights.

    Args:
        config: of the run.
        weights: the run's final weights, as `PipelineGenerator.save_network` wrote them.
        folder: to write into.
        root: repository root, for the base's settings.

    Raises:
        NamesError: a layer has no place under the original names.
        GeneratorError: the base's settings cannot be read.
    """
    adapter, rules = _rules(config)
    part, name = adapter.network_folder, f"{config.experiment.name}-{config.run_name}.safetensors"
    location = checkpoint_location(config.generator, root)
    settings = load_part(adapter.network_class.load_config, location, part, config.generator, weights=False)
    with torch.device("meta"):
        network = adapter.network_class.from_config(settings)
    named = rules(network.config)
    if config.training.lora is None:
        state = _tensors(sorted((weights / part).glob("*.safetensors")))
        found = original_state(state, named)
        written = ComfyFile(name, "models/diffusion_models", len(state), len(found))
    else:
        prefix = f"{part}."
        layers = {key.removeprefix(prefix): value for key, value in load_file(weights / LORA_FILE).items()}
        rows = {key.removesuffix(".weight"): len(value) for key, value in network.state_dict().items()}
        found, held = original_lora(layers, rows, named)
        written = ComfyFile(name, "models/loras", held, len(found) // 2)
    save_file(found, folder / name, metadata={"format": "pt"})
    return written


def _rules(config: Config) -> tuple[type[PipelineGenerator], Any]:
    adapter = resolve_class(config.generator)
    what = f"--format comfyui: generator.family {config.generator.family!r}"
    if not issubclass(adapter, PipelineGenerator):
        raise NamesError(
            f"{what}: only a PipelineGenerator's network has names that are known; export without --format"
        )
    network = adapter.network_class.__name__
    if network not in NAMES:
        reason = REFUSED.get(network, "its original repository's names are not known to vipo")
        raise NamesError(f"{what} ({network}): {reason}; export without --format")
    return adapter, NAMES[network]


def _tensors(files: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    return found
