"""Cached prompt conditioning: text encoders run once, in the `encode` stage, and never during training.

A prompt's tensors stay in their file until they are asked for: neither main memory nor a device holds those of all.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import NEGATIVE, GeneratorError, checkpoint_location
from vipo.generators.configured import check_device, resolve_class
from vipo.generators.loading import without_loading_bars
from vipo.generators.texts import shown
from vipo.prompts import Prompt
from vipo.provenance.files import file_sha256

log = logging.getLogger(__name__)

ORIGIN, FILES = "origin", "files"
"""Key of a file's metadata that says what it belongs to (JSON), and in it, of several files, their SHA-256 by name."""

_AGAIN = "; run the encode stage again"
_ENCODERS = ("text_encoder", "tokenizer", "connectors")


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
    place = f"{config.path}: the text encoders' output"
    _check_shapes(place, ({name: tuple(value.shape) for name, value in row.items()} for row in encoded), widths)
    _check_values(place, encoded)
    _warn_of_twins(prompts, encoded)
    return found


def encoder_hashes(config: GeneratorConfig, root: Path) -> dict[str, str]:
    """SHA-256 of each text encoder, connectors and tokenizer of a local checkpoint, by subfolder: of names and hashes.

    Nothing of a hub id: its commit, which is part of the configuration, pins them.

    Raises:
        GeneratorError: there is no such checkpoint.
    """
    location = checkpoint_location(config, root)
    if not isinstance(location, Path):
        return {}
    found, named = {}, resolve_class(config).prompt_tokenizers or ()
    read = (path for path in location.iterdir() if path.name.startswith(_ENCODERS) or path.name in named)
    for folder in sorted(path for path in read if path.is_dir()):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        found[folder.name] = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return found


def check_embeddings(path: Path, prompts: Path, identity: Mapping[str, Any], encoders: Mapping[str, str]) -> None:
    """Check that an embeddings file was made with this configuration and these text encoders, of these prompts.

    Args:
        path: file that `vipo.generators.encoding.encode_prompt_file` wrote.
        prompts: the prepared prompts that it should belong to.
        identity: `Config.embeddings_identity`.
        encoders: `encoder_hashes` of the generator as it is now.

    Raises:
        GeneratorError: the file is missing, damaged, or made with another configuration, by other text encoders or of
            other prompts.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            found = dict(json.loads((stream.metadata() or {}).get(ORIGIN, "{}")))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise GeneratorError(f"{path}: embeddings cannot be read ({error}){_AGAIN}") from error
    wanted, files = origin(prompts, identity, encoders), found.pop(FILES, {})
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
    if missing := [name for name in files if not (path.parent / name).is_file()]:
        raise GeneratorError(f"{path.parent / missing[0]}: missing; run the stage 'encode' again")


def origin(prompts: Path, identity: Mapping[str, Any], encoders: Mapping[str, str]) -> dict[str, Any]:
    """What embeddings belong to: configuration, prompts and text encoders."""
    return {"config": dict(identity), "prompts_sha256": file_sha256(prompts), "encoders": dict(encoders)}


def _check_shapes(
    place: str, rows: Iterable[Mapping[str, tuple[int, ...]]], widths: Mapping[str, int], remedy: str = ""
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for number, row in enumerate(rows):
        if number and row.keys() != shapes.keys():
            raise GeneratorError(f"{place}: tensors {sorted(row)} of one prompt, {sorted(shapes)} of another{remedy}")
        for name, shape in row.items():
            width = widths.get(name.removeprefix(NEGATIVE))
            if shapes.setdefault(name, shape) != shape:
                raise GeneratorError(f"{place}: {name}: shape {shape} of one prompt, {shapes[name]} of another{remedy}")
            if width is not None and shape[-1:] != (width,):
                raise GeneratorError(
                    f"{place}: {name}: width {shape[-1] if shape else 0}, but the network of generator.path takes "
                    f"{width}{remedy}"
                )
    if missing := sorted(set(widths) - set(shapes)) if shapes else []:
        raise GeneratorError(f"{place}: lacks {', '.join(missing)}{remedy}")


def _check_values(place: str, rows: Iterable[Mapping[str, Tensor]], remedy: str = "") -> None:
    for row in rows:
        for name, value in row.items():
            if value.dtype != torch.float32 or not bool(value.isfinite().all()):
                raise GeneratorError(f"{place}: {name}: not finite float32 ({value.dtype}){remedy}")


def _warn_of_twins(rows: Sequence[Prompt], encoded: Sequence[Mapping[str, Tensor]]) -> None:
    alike: dict[str, list[Prompt]] = {}
    for prompt, conditioning in zip(rows, encoded, strict=True):
        digest = hashlib.sha256()
        for name in sorted(conditioning):
            digest.update(conditioning[name].float().cpu().contiguous().numpy().tobytes())
        alike.setdefault(digest.hexdigest(), []).append(prompt)
    twins = [group for group in alike.values() if len(group) > 1]
    if twins:
        log.warning(
            "%d prompts are encoded exactly as another one, so the generator cannot tell them apart; first %s and %s",
            sum(len(group) for group in twins),
            shown(twins[0][0].text),
            shown(twins[0][1].text),
        )


class Embeddings(Mapping[str, dict[str, Tensor]]):
    """Conditioning by prompt id, float32, read from mapped files when it is asked for.

    A file that is replaced meanwhile is read as it was.
    """

    def __init__(
        self,
        streams: Mapping[str, Any],
        names: Sequence[str],
        negative: Mapping[str, Tensor],
        device: torch.device | str,
    ) -> None:
        """Take open files.

        Args:
            streams: by prompt id, the one that holds its tensors.
            names: of a prompt's tensors.
            negative: the tensors of the negative prompt.
            device: where to tensors are read.
        """
        self._streams, self._names, self._negative, self._device = streams, names, negative, device

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __or__(self, other: "Embeddings") -> "Embeddings":
        """Those of both; the negative prompt's are this one's."""
        return Embeddings({**self._streams, **other._streams}, self._names, self._negative, self._device)

    def __getitem__(self, owner: str) -> dict[str, Tensor]:
        stream = self._streams[owner]
        row = {name: stream.get_tensor(f"{owner}/{name}").float() for name in self._names}
        for name, value in row.items():
            # Before it is on the device, which nobody waits for then.
            if not np.isfinite(value.numpy()).all():
                raise GeneratorError(f"embeddings of prompt {owner}: {name} is not finite{_AGAIN}")
        if torch.device(self._device).type == "cuda":
            # From pinned memory the host goes on while they are copied.
            row = {name: value.pin_memory() for name, value in row.items()}
        return {**self._negative, **{name: value.to(self._device, non_blocking=True) for name, value in row.items()}}


def load_embeddings(
    path: Path,
    prompts: Sequence[Prompt],
    device: torch.device | str = "cpu",
    widths: Mapping[str, int] = MappingProxyType({}),
) -> Embeddings:
    """Conditioning by prompt id, for `prompts`, none of which is held.

    Args:
        path: file that `vipo.generators.encoding.encode_prompt_file` wrote.
        prompts: whose conditioning is read.
        device: where to.
        widths: `Generator.conditioning_widths`.

    Raises:
        GeneratorError: a file is missing or damaged or lacks a prompt, or tensors do not fit each other or the network.
    """
    wanted = {prompt.id for prompt in prompts}
    streams: dict[str, Any] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    try:
        # Held open: the run goes on with these files, whatever takes their place.
        head: Any = safe_open(path, framework="pt", device="cpu")
        listed = dict(json.loads((head.metadata() or {}).get(ORIGIN, "{}"))).get(FILES, {})
        negative = {name: head.get_tensor(name).to(device).float() for name in sorted(head.keys()) if "/" not in name}
        others: list[Any] = [safe_open(path.parent / Path(name).name, "pt", device="cpu") for name in listed]
        for stream in (head, *others):
            for key in sorted(stream.keys()):
                owner, _, name = key.rpartition("/")
                if owner in wanted:
                    streams[owner] = stream
                    part = stream.get_slice(key)
                    if part.get_dtype() not in ("F32", "BF16"):
                        raise GeneratorError(f"{path}: {name}: not finite float32 ({part.get_dtype()}){_AGAIN}")
                    shapes.setdefault(owner, {})[name] = tuple(part.get_shape())
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise GeneratorError(f"{path}: embeddings cannot be read ({error}){_AGAIN}") from error
    missing = [prompt.text for prompt in prompts if prompt.id not in streams]
    if missing:
        raise GeneratorError(f"{path}: lacks {len(missing)} prompts, first {missing[0]!r}{_AGAIN}")
    # Of several files it would take as long as to read them: each value is checked when it is used.
    own_rows = (
        {name: head.get_tensor(f"{owner}/{name}").float() for name in shapes[owner]}
        for owner, stream in streams.items()
        if stream is head
    )
    _check_values(str(path), itertools.chain([negative], own_rows), _AGAIN)
    own = {name: tuple(value.shape) for name, value in negative.items()}
    _check_shapes(str(path), ({**own, **shapes[prompt.id]} for prompt in prompts), widths, _AGAIN)
    names = list(shapes[prompts[0].id]) if prompts else []
    return Embeddings(
        {prompt.id: streams[prompt.id] for prompt in prompts},
        names,
        negative,
        device,
    )


def stack_conditioning(embeddings: Mapping[str, Mapping[str, Tensor]], ids: Sequence[str]) -> dict[str, Tensor]:
    """Conditioning of a batch of prompt ids: every tensor gains the batch dimension in front."""
    rows = {owner: embeddings[owner] for owner in dict.fromkeys(ids)}
    return {name: torch.stack([rows[owner][name] for owner in ids]) for name in rows[ids[0]]}
