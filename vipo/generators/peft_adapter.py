"""An adapter as peft saves it: layers beside a file that says how strong they are."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from vipo.generators.base import GeneratorError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
# Those leave the checkpoint's weights as they are; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them.
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")
# Of an adapter's options those that say where its layers are, or how they were trained, which its tensors show.
_NO_MATTER = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "r"),
        *("lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
_READ = frozenset({"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"})
# As an adapter without them has them.
_PLAIN: Mapping[str, Any] = MappingProxyType({"bias": "none"})


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter as peft saves it, or a file is the one with its weights."""
    weights = path / WEIGHTS if path.is_dir() else path
    return weights.name == WEIGHTS and weights.is_file() and weights.with_name(CONFIG).is_file()


def adapter_layers(file: Path, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A peft adapter as a LoRA in diffusers' names, its strength in the weights.

    Args:
        file: the adapter's weights; what says how strong they are stands beside it.
        tensors: of the file.
        prefix: which names of diffusers begin with, the network's subfolder.

    Raises:
        GeneratorError: it is no LoRA, or more than one: DoRA, biases, whole modules, base weights of its own.
    """
    options = _options(file.with_name(CONFIG))
    if strange := [name for name in tensors if not name.startswith(_PREFIX)]:
        raise GeneratorError(f"{file}: {strange[0]}: is no tensor of an adapter as peft saves it")
    found = {}
    for name, value in tensors.items():
        layer = name.removeprefix(_PREFIX)
        module, _, side = layer.partition(".lora_")
        strength = 1.0
        if side == "A.weight":
            patterns = options.get("alpha_pattern") or {}
            alpha = float(patterns.get(get_pattern_key(list(patterns), module), options["lora_alpha"]))
            strength = alpha / (math.sqrt(len(value)) if options.get("use_rslora") else len(value))
        elif side != "B.weight":
            raise GeneratorError(
                f"{file}: {name}: is more than a LoRA; merge it with peft's merge_and_unload and give generator.file"
            )
        found[f"{prefix}.{layer}"] = value * strength
    return found


def _options(file: Path) -> dict[str, Any]:
    try:
        options = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise GeneratorError(f"{file}: cannot be read: {error}") from error
    if not isinstance(options, dict) or options.get("peft_type") != "LORA" or "lora_alpha" not in options:
        raise GeneratorError(f"{file}: is no LoRA's (peft_type LORA, with lora_alpha)")
    if (initial := options.get("init_lora_weights", True)) not in _INITIAL:
        raise GeneratorError(
            f"{file}: init_lora_weights {initial!r}: such an adapter belongs to weights that are not the checkpoint's; "
            "save it with peft's path_initial_model_for_weight_conversion"
        )
    for name, value in options.items():
        if name not in _NO_MATTER | _READ and value and value != _PLAIN.get(name):
            raise GeneratorError(
                f"{file}: {name} {value!r}: is more than a LoRA; merge it with peft's merge_and_unload and give "
                "generator.file"
            )
    return options
