"""A run's weights as one file under the names that ComfyUI knows: a family's original ones, mostly."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vipo.config.run import Config
from vipo.generators.base import checkpoint_location
from vipo.generators.configured import resolve_class
from vipo.generators.lora import LORA_FILE
from vipo.generators.original import NamesError, original_lora, original_state
from vipo.generators.original_names import NAMES, REFUSED, Rules
from vipo.generators.original_videos import whole_refused
from vipo.generators.parts import load_part
from vipo.generators.pipeline import PipelineGenerator


@dataclass(frozen=True)
class ComfyFiles:
    """What was written.

    Attributes:
        names: of the files, one a trained network.
        levels: of a family with two networks, which one each file is for, "high-noise" or "low-noise"; else empty.
        folder: of ComfyUI that they belong into, below its own.
        held: layers of ours that they hold under original names: those that were adapted, or of all weights every
            tensor; none is left out, or nothing is written.
        original: layers (LoRA) or tensors of the original that they make.
    """

    names: tuple[str, ...]
    levels: tuple[str, ...]
    folder: str
    held: int
    original: int


def check_comfyui(config: Config, root: Path) -> None:
    """Refuse weights that ComfyUI does not read, or whose names there are not known, before anything is written.

    Args:
        config: of the run.
        root: repository root, for the base's settings.

    Raises:
        NamesError: naming the family and why.
        GeneratorError: the base's settings cannot be read.
    """
    adapter, _ = _rules(config)
    network = adapter.network_class.__name__
    if config.training.lora is None and (reason := whole_refused(network, _settings(config, adapter, root))):
        raise _refusal(config, network, reason)


def write_comfyui(config: Config, weights: Path, folder: Path, root: Path) -> ComfyFiles:
    """Write ``<experiment>-<run>.safetensors``: the trained network, or its LoRA weights.

    Where it is not the first network alone, the name of each one's part stands behind:
    ``...-transformer_2.safetensors``.

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
    part = adapter.network_folder
    with torch.device("meta"):
        network = adapter.network_class.from_config(_settings(config, adapter, root))
    named = rules(network.config)
    lora = config.training.lora is not None
    rows = {key.removesuffix(".weight"): len(value) for key, value in network.state_dict().items()}
    trained = _lora_files(part, weights) if lora else _weight_files(weights)
    names, held, original = [], 0, 0
    for own, files in trained.items():
        state = {key: value for file in files for key, value in load_file(file).items()}
        if lora:
            state = {key.removeprefix(f"{part}."): value for key, value in state.items()}
            found, count = original_lora(state, rows, named)
        else:
            found, count = original_state(state, named), len(state)
        behind = "" if [*trained] == [part] else f"-{own}"
        names.append(f"{config.experiment.name}-{config.run_name}{behind}.safetensors")
        save_file(found, folder / names[-1], metadata={"format": "pt"})
        held, original = held + count, original + len(found) // (2 if lora else 1)
    levels = ("low-noise" if own == adapter.second_folder else "high-noise" for own in trained)
    place = "models/loras" if lora else "models/diffusion_models"
    return ComfyFiles(tuple(names), tuple(levels) if adapter.second_folder else (), place, held, original)


def _rules(config: Config) -> tuple[type[PipelineGenerator], Rules]:
    adapter = resolve_class(config.generator)
    if not issubclass(adapter, PipelineGenerator):
        raise _refusal(config, adapter.__name__, "only a PipelineGenerator's network has names that are known")
    network = adapter.network_class.__name__
    if network not in NAMES or network in REFUSED:
        raise _refusal(config, network, REFUSED.get(network, "the names that ComfyUI has for it are not known to vipo"))
    return adapter, NAMES[network]


def _refusal(config: Config, network: str, reason: str) -> NamesError:
    what = f"--format comfyui: generator.family {config.generator.family!r} ({network})"
    return NamesError(f"{what}: {reason}; export without --format")


def _settings(config: Config, adapter: type[PipelineGenerator], root: Path) -> Mapping[str, Any]:
    location, part = checkpoint_location(config.generator, root), adapter.network_folder
    found: Mapping[str, Any] = load_part(
        adapter.network_class.load_config, location, part, config.generator, weights=False
    )
    return found


def _weight_files(weights: Path) -> dict[str, list[Path]]:
    """Files of each whole network, by its subfolder."""
    folders = sorted(path for path in weights.iterdir() if path.is_dir())
    found = {path.name: sorted(path.glob("*.safetensors")) for path in folders}
    return {name: files for name, files in found.items() if files}


def _lora_files(part: str, weights: Path) -> dict[str, list[Path]]:
    """The file of each adapted network, by its subfolder in the base: of a second one the file's name ends so too."""
    stem = Path(LORA_FILE).stem
    return {f"{part}{path.stem.removeprefix(stem)}": [path] for path in sorted(weights.glob(f"{stem}*.safetensors"))}
