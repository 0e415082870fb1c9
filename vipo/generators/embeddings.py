"""Cached prompt conditioning: text encoders run once, in the `encode` stage, and never during training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vipo.config.models import GeneratorConfig
from vipo.generators.base import NEGATIVE, GeneratorError, check_device, resolve_class
from vipo.generators.loading import without_loading_bars
from vipo.prompts import Prompt, read_prompts
from vipo.provenance.files import atomic_file, file_sha256

_ORIGIN = "origin"


@without_loading_bars()
def encode_prompt_file(
    config: GeneratorConfig, root: Path, prompts: Path, output: Path, identity: Mapping[str, Any]
) -> None:
    """Encode every prompt of a prepared jsonl file into ``<prompt id>/<name>`` tensors of one safetensors file.

    The negative prompt's tensors, the same for all, stand there once, as ``negative_<name>``. The file's metadata
    `origin` (JSON) holds `identity` and the SHA-256 of `prompts`, so that the file itself tells what it belongs to.

    Args:
        config: the generator whose text encoders are run.
        root: repository root, for relative paths.
        prompts: ``train.jsonl`` or ``eval.jsonl`` of the prepared prompts.
        output: safetensors file to write.
        identity: `Config.embeddings_identity`.

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
        # One entry: safetensors writes several in an order that changes from process to process.
        save_file(tensors, temporary, metadata={_ORIGIN: json.dumps(_origin(prompts, identity), sort_keys=True)})


def check_embeddings(path: Path, prompts: Path, identity: Mapping[str, Any]) -> None:
    """Check that an embeddings file was made with this configuration, of these prompts.

    Args:
        path: file that `encode_prompt_file` wrote.
        prompts: the prepared prompts that it should belong to.
        identity: `Config.embeddings_identity`.

    Raises:
        GeneratorError: the file is missing, damaged, or made with another configuration or of other prompts.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            found = json.loads((stream.metadata() or {}).get(_ORIGIN, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise GeneratorError(f"{path}: embeddings cannot be read ({error}); run the encode stage again") from error
    wanted = _origin(prompts, identity)
    if found.get("config") != wanted["config"]:
        told = ", ".join(f"{key}={value}" for key, value in identity.items())
        raise GeneratorError(
            f"{path}: made with another configuration than this run's ({told}); "
            "run the stage 'encode' again with it, or choose another results folder"
        )
    if found != wanted:
        raise GeneratorError(f"{path}: made of other prompts than {prompts}; run the stage 'encode' again")


def _origin(prompts: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": dict(identity), "prompts_sha256": file_sha256(prompts)}


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
