"""Cached prompt conditioning: text encoders run once, in the `encode` stage, and never during training."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vipo.config.models import GeneratorConfig
from vipo.generators.base import NEGATIVE, GeneratorError, check_device, resolve_class
from vipo.prompts import Prompt, read_prompts
from vipo.provenance.files import atomic_file


def encode_prompt_file(config: GeneratorConfig, root: Path, prompts: Path, output: Path) -> None:
    """Encode every prompt of a prepared jsonl file into ``<prompt id>/<name>`` tensors of one safetensors file.

    The negative prompt's tensors, the same for all, stand there once, as ``negative_<name>``.

    Raises:
        GeneratorError: the device is absent, or the generator's text encoders cannot be loaded.
        PromptError: the prompt file is missing or damaged.
    """
    check_device(config)
    rows = read_prompts(prompts)
    encoded = resolve_class(config).encode_prompts(config, root, [prompt.text for prompt in rows])
    tensors = {
        name if name.startswith(NEGATIVE) else f"{prompt.id}/{name}": value.contiguous()
        for prompt, conditioning in zip(rows, encoded, strict=True)
        for name, value in conditioning.items()
    }
    with atomic_file(output) as temporary:
        save_file(
            tensors, temporary, metadata={"generator": json.dumps(config.model_dump(mode="json"), sort_keys=True)}
        )


def load_embeddings(
    path: Path, prompts: Sequence[Prompt], device: torch.device | str = "cpu"
) -> dict[str, dict[str, Tensor]]:
    """Conditioning by prompt id, for `prompts`.

    Raises:
        GeneratorError: the file is missing or damaged, or lacks a prompt.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            names: dict[str, list[str]] = {}
            for key in sorted(stream.keys()):
                owner, _, name = key.rpartition("/")
                names.setdefault(owner, []).append(name)
            negative = {name: stream.get_tensor(name).to(device) for name in names.pop("", [])}
            found = {
                prompt.id: negative
                | {name: stream.get_tensor(f"{prompt.id}/{name}").to(device) for name in names[prompt.id]}
                for prompt in prompts
                if prompt.id in names
            }
    except (OSError, SafetensorError) as error:
        raise GeneratorError(f"{path}: embeddings cannot be read ({error}); run the encode stage again") from error
    missing = [prompt.text for prompt in prompts if prompt.id not in found]
    if missing:
        raise GeneratorError(f"{path}: lacks {len(missing)} prompts, first {missing[0]!r}; run the encode stage again")
    return found


def stack_conditioning(embeddings: dict[str, dict[str, Tensor]], ids: Sequence[str]) -> dict[str, Tensor]:
    """Conditioning of a batch of prompt ids: every tensor gains the batch dimension in front."""
    return {name: torch.stack([embeddings[i][name] for i in ids]) for name in embeddings[ids[0]]}
