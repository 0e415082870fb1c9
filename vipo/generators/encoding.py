"""The files of the `encode` stage: prompts in, conditioning out, a part at a time.

Up to `PER_FILE` prompts lie in one file. More lie in several beside it, each written whole or not at all, so that a
stage that was killed goes on with the one it was at, and several processes share them. No part depends on another one.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import NEGATIVE, GeneratorError
from vipo.generators.embeddings import FILES, ORIGIN, encode_prompts, encoder_hashes, origin
from vipo.prompts import Prompt, read_prompts
from vipo.provenance.files import damaged_part, file_sha256
from vipo.provenance.parts import names_of, save_tensors, write_tensors

log = logging.getLogger(__name__)

PER_FILE = 512
"""Prompts of a file: of FLUX 2.1 GB in bf16, 4.3 GB in fp32, which is what encoding holds in main memory."""


@dataclass(frozen=True)
class _Work:
    """What a process encodes: some of the files of one split."""

    config: GeneratorConfig
    root: Path
    files: Mapping[Path, Sequence[Prompt]]
    told: Mapping[str, Any]
    threads: int


def encode_prompt_file(
    config: GeneratorConfig,
    root: Path,
    prompts: Path,
    output: Path,
    identity: Mapping[str, Any],
    processes: int = 1,
    per_file: int = PER_FILE,
) -> list[Path]:
    """Encode every prompt of a prepared jsonl file into ``<prompt id>/<name>`` tensors of safetensors files.

    The negative prompt's tensors, the same for all, stand once in `output`, as ``negative_<name>``. Its metadata
    `origin` (JSON) holds `identity` and the SHA-256 of `prompts`, text encoders, tokenizers and, where there are
    several, of the files ``<output>-00001-of-00003.safetensors`` with the prompts' tensors. Prompts of one file that
    are encoded alike are warned of. Each prompt is encoded by itself, or with neighbours of its own file, as
    ``encoder_batch`` says: on no other process or resume do its tensors depend.

    Args:
        config: the generator whose text encoders are run.
        root: repository root, for relative paths.
        prompts: ``train.jsonl`` or ``eval.jsonl`` of the prepared prompts.
        output: safetensors file to write.
        identity: `Config.embeddings_identity`.
        processes: that share the files, where there are several; on GPUs one each.
        per_file: prompts of one.

    Returns:
        All files, `output` first.

    Raises:
        GeneratorError: the device is absent, the generator's text encoders cannot be loaded, or they make other
            tensors than its network takes.
        PromptError: the prompt file is missing or damaged.
    """
    # Before they are run: a change meanwhile does not go unnoticed.
    belongs = origin(prompts, identity, encoder_hashes(config, root))
    rows = read_prompts(prompts)
    if len(rows) <= per_file:
        tensors = _tensors(config, root, rows)
        write_tensors(tensors, output, belongs, ORIGIN)
        return [output]
    parts = [rows[start : start + per_file] for start in range(0, len(rows), per_file)]
    names = [f"{output.stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    files = {output.with_name(name): part for name, part in zip(names, parts, strict=True)}
    left = {file: part for file, part in files.items() if not _is_done(file, part, belongs)}
    if len(left) < len(files):
        log.info("%s: %d of %d files are there, going on", output, len(files) - len(left), len(files))
    _share(_Work(config, root, left, belongs, torch.get_num_threads()), processes)
    with safe_open(next(iter(files)), framework="pt") as stream:
        negative = {name: stream.get_tensor(name) for name in stream.keys() if "/" not in name}  # noqa: SIM118
    told = {**belongs, FILES: {file.name: file_sha256(file) for file in files}}
    write_tensors(negative, output, told, ORIGIN)
    for other in output.parent.glob(f"{output.stem}-*-of-*.safetensors"):
        if other not in files:
            other.unlink()
    return [output, *files]


def _share(work: _Work, processes: int) -> None:
    count = min(processes, len(work.files))
    if work.config.device == "cuda":
        count = min(count, torch.cuda.device_count())
    if count <= 1:
        _encode(work)
        return
    listed = list(work.files.items())
    shares = [replace(work, files=dict(listed[number::count])) for number in range(count)]
    if work.config.device == "cuda":
        shares = [
            replace(share, config=share.config.model_copy(update={"device": f"cuda:{number}"}))
            for number, share in enumerate(shares)
        ]
    # Fresh ones: CUDA does not survive a fork.
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        try:
            list(pool.map(_encode, shares))
        except BaseException as error:
            # A signal, or another one's error: nobody waits for the rest of their files.
            for child in active_children():
                child.terminate()
            if not isinstance(error, BrokenProcessPool):
                raise
            raise GeneratorError(
                f"{work.config.path}: one of {count} processes that encode prompts was killed, perhaps for want of "
                "main memory; lower distribution.processes or raise cluster.encode.memory_mb, and run the stage "
                "again: it goes on"
            ) from error


def _encode(work: _Work) -> None:
    torch.set_num_threads(work.threads)
    for file, part in work.files.items():
        save_tensors(_tensors(work.config, work.root, part), file, work.told, ORIGIN)
        log.info("%s: %d prompts", file, len(part))


def _tensors(config: GeneratorConfig, root: Path, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    return {
        name if name.startswith(NEGATIVE) else f"{owner}/{name}": _held(value, config)
        for owner, conditioning in encode_prompts(config, root, prompts).items()
        for name, value in conditioning.items()
    }


def _held(value: Tensor, config: GeneratorConfig) -> Tensor:
    """As the encoders gave it: what came of bf16 is held in bf16, where nothing was computed with it since."""
    small = value.bfloat16()
    return small.contiguous() if config.encoders == "bf16" and torch.equal(small.float(), value) else value.contiguous()


def _is_done(file: Path, prompts: Sequence[Prompt], belongs: Mapping[str, Any]) -> bool:
    """Whether a file is one of this encoding, left by a stage that was killed; a damaged one goes away."""
    if file.is_file():
        with damaged_part(file):
            if (names := names_of(file, ORIGIN, belongs)) is not None:
                return {name.rpartition("/")[0] for name in names} - {""} == {prompt.id for prompt in prompts}
    return False
