"""Cached prompt conditioning: text encoders run once, in the `encode` stage, and never during training."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import NEGATIVE, GeneratorError, check_device, checkpoint_location, resolve_class
from vipo.generators.loading import without_loading_bars
from vipo.generators.texts import shown
from vipo.prompts import Prompt, read_prompts
from vipo.provenance.files import atomic_file, file_sha256

log = logging.getLogger(__name__)

_ORIGIN = "origin"
_ENCODERS = ("text_encoder", "tokenizer")


@without_loading_bars()
def encode_prompts(config: GeneratorConfig, root: Path, prompts: Sequence[Prompt]) -> dict[str, dict[str, Tensor]]:
    """Conditioning by prompt id, as `load_embeddings` gives it, without a file; prompts encoded alike are warned of.

    Args:
        config: the generator whose text encoders are run.
        root: repository root, for relative paths.
        prompts: at least one.

    Raises:
        GeneratorError: the device is absent, the generator's text encoders cannot be loaded, or they make other
            tensors than its network takes.
    """
    check_device(config)
    adapter = resolve_class(config)
    adapter.check(config, root)
    encoded = adapter.encode_prompts(config, root, [prompt.text for prompt in prompts])
    if len(encoded) != len(prompts):
        raise GeneratorError(f"generator.family {config.family!r}: {len(encoded)} encodings of {len(prompts)} prompts")
    found = {prompt.id: row for prompt, row in zip(prompts, encoded, strict=True)}
    widths = adapter.conditioning_widths(config, root)
    _check_conditioning(f"{config.path}: the text encoders' output", found, widths)
    _warn_of_twins(prompts, encoded)
    return found


def encode_prompt_file(
    config: GeneratorConfig, root: Path, prompts: Path, output: Path, identity: Mapping[str, Any]
) -> None:
    """Encode every prompt of a prepared jsonl file into ``<prompt id>/<name>`` tensors of one safetensors file.

    The negative prompt's tensors, the same for all, stand there once, as ``negative_<name>``. The file's metadata
    `origin` (JSON) holds `identity` and the SHA-256 of `prompts`, text encoders and tokenizers, so that the file itself
    tells what it belongs to. Prompts that are encoded alike are warned of.

    Args:
        config: the generator whose text encoders are run.
        root: repository root, for relative paths.
        prompts: ``train.jsonl`` or ``eval.jsonl`` of the prepared prompts.
        output: safetensors file to write.
        identity: `Config.embeddings_identity`.

    Raises:
        GeneratorError: the device is absent, the generator's text encoders cannot be loaded, or they make other
            tensors than its network takes.
        PromptError: the prompt file is missing or damaged.
    """
    # Before they are run: a change meanwhile does not go unnoticed.
    encoders = encoder_hashes(config, root)
    tensors = {
        name if name.startswith(NEGATIVE) else f"{owner}/{name}": value.contiguous()
        for owner, conditioning in encode_prompts(config, root, read_prompts(prompts)).items()
        for name, value in conditioning.items()
    }
    with atomic_file(output) as temporary:
        # One entry: safetensors writes several in an order that changes from process to process.
        origin = json.dumps(_origin(prompts, identity, encoders), sort_keys=True)
        save_file(tensors, temporary, metadata={_ORIGIN: origin})


def encoder_hashes(config: GeneratorConfig, root: Path) -> dict[str, str]:
    """SHA-256 of each text encoder and tokenizer of a local checkpoint, by subfolder: of its files' names and hashes.

    Nothing of a hub id: its commit, which is part of the configuration, pins them.

    Raises:
        GeneratorError: there is no such checkpoint.
    """
    location = checkpoint_location(config, root)
    if not isinstance(location, Path):
        return {}
    found = {}
    for folder in sorted(path for path in location.iterdir() if path.is_dir() and path.name.startswith(_ENCODERS)):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        found[folder.name] = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return found


def check_embeddings(path: Path, prompts: Path, identity: Mapping[str, Any], encoders: Mapping[str, str]) -> None:
    """Check that an embeddings file was made with this configuration and these text encoders, of these prompts.

    Args:
        path: file that `encode_prompt_file` wrote.
        prompts: the prepared prompts that it should belong to.
        identity: `Config.embeddings_identity`.
        encoders: `encoder_hashes` of the generator as it is now.

    Raises:
        GeneratorError: the file is missing, damaged, or made with another configuration, by other text encoders or of
            other prompts.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            found = dict(json.loads((stream.metadata() or {}).get(_ORIGIN, "{}")))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise GeneratorError(f"{path}: embeddings cannot be read ({error}); run the encode stage again") from error
    wanted = _origin(prompts, identity, encoders)
    if found.get("config") != wanted["config"]:
        told = ", ".join(f"{key}={value}" for key, value in identity.items())
        raise GeneratorError(
            f"{path}: made with another configuration than this run's ({told}); "
            "run the stage 'encode' again with it, or choose another results folder"
        )
    made_by = found.get("encoders")
    if not isinstance(made_by, dict):
        raise GeneratorError(
            f"{path}: does not name the text encoders that made it, as an older vipo's; run the stage 'encode' again"
        )
    if changed := sorted(part for part in {*made_by, *encoders} if made_by.get(part) != encoders.get(part)):
        raise GeneratorError(
            f"{path}: made by other text encoders or tokenizers than generator.path holds now ({', '.join(changed)} "
            "changed since); run the stage 'encode' again and train again, or restore them"
        )
    if found != wanted:
        raise GeneratorError(f"{path}: made of other prompts than {prompts}; run the stage 'encode' again")


def _origin(prompts: Path, identity: Mapping[str, Any], encoders: Mapping[str, str]) -> dict[str, Any]:
    return {"config": dict(identity), "prompts_sha256": file_sha256(prompts), "encoders": dict(encoders)}


def _check_conditioning(
    place: str, found: Mapping[str, Mapping[str, Tensor]], widths: Mapping[str, int], remedy: str = ""
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for number, row in enumerate(found.values()):
        if number and row.keys() != shapes.keys():
            raise GeneratorError(f"{place}: tensors {sorted(row)} of one prompt, {sorted(shapes)} of another{remedy}")
        for name, value in row.items():
            shape = tuple(value.shape)
            width = widths.get(name.removeprefix(NEGATIVE))
            if shapes.setdefault(name, shape) != shape:
                raise GeneratorError(f"{place}: {name}: shape {shape} of one prompt, {shapes[name]} of another{remedy}")
            if width is not None and shape[-1:] != (width,):
                raise GeneratorError(
                    f"{place}: {name}: width {shape[-1] if shape else 0}, but the network of generator.path takes "
                    f"{width}{remedy}"
                )
            if value.dtype != torch.float32 or not bool(value.isfinite().all()):
                raise GeneratorError(f"{place}: {name}: not finite float32 ({value.dtype}){remedy}")
    if missing := sorted(set(widths) - set(shapes)) if found else []:
        raise GeneratorError(f"{place}: lacks {', '.join(missing)}{remedy}")


def _warn_of_twins(rows: Sequence[Prompt], encoded: Sequence[Mapping[str, Tensor]]) -> None:
    alike: dict[str, list[Prompt]] = {}
    for prompt, conditioning in zip(rows, encoded, strict=True):
        digest = hashlib.sha256()
        for name in sorted(conditioning):
            digest.update(conditioning[name].cpu().contiguous().numpy().tobytes())
        alike.setdefault(digest.hexdigest(), []).append(prompt)
    twins = [group for group in alike.values() if len(group) > 1]
    if twins:
        log.warning(
            "%d prompts are encoded exactly as another one, so the generator cannot tell them apart; first %s and %s",
            sum(len(group) for group in twins),
            shown(twins[0][0].text),
            shown(twins[0][1].text),
        )


def load_embeddings(
    path: Path,
    prompts: Sequence[Prompt],
    device: torch.device | str = "cpu",
    widths: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, dict[str, Tensor]]:
    """Conditioning by prompt id, for `prompts`.

    Args:
        path: file that `encode_prompt_file` wrote.
        prompts: whose conditioning is read.
        device: where to.
        widths: `Generator.conditioning_widths`.

    Raises:
        GeneratorError: the file is missing or damaged, lacks a prompt, or its tensors do not fit each other or the
            network.
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
    _check_conditioning(str(path), found, widths, "; run the encode stage again")
    return found


def stack_conditioning(embeddings: dict[str, dict[str, Tensor]], ids: Sequence[str]) -> dict[str, Tensor]:
    """Conditioning of a batch of prompt ids: every tensor gains the batch dimension in front."""
    return {name: torch.stack([embeddings[i][name] for i in ids]) for name in embeddings[ids[0]]}
