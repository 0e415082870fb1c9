"""How much main memory encoding and reading take, by the number of prompts; its text encoder draws narrow tensors.

    python -m benchmarks.embeddings 1000 10000 100000

Memory is what is the process's own (RssAnon): pages of mapped files, which the system takes back when it needs them,
are not in it.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.generators import Generator
from vipo.generators.embeddings import load_embeddings
from vipo.generators.encoding import encode_prompt_file
from vipo.prompts import Prompt
from vipo.prompts.prompt import prompt_id

# Updates of 8 prompts that are read.
_UPDATES, _PROMPTS = 100, 8


class Drawn(Generator):
    """A generator of which only the text encoder is there."""

    network_folder = "none"
    most: ClassVar[int] = 0

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> "Drawn":
        raise NotImplementedError

    @classmethod
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(len(texts))
        rows = [
            {"tokens": torch.randn(16, 32, generator=draw), "pooled": torch.randn(32, generator=draw)} for _ in texts
        ]
        Drawn.most = max(Drawn.most, own_memory())
        return rows

    def _absent(self, *_: object, **__: object) -> None:
        raise NotImplementedError

    _predict = decode = _absent  # type: ignore[assignment]
    add_lora = save_network = load_network = _absent


def own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(count: int, folder: Path) -> list[str]:
    """Cells of one row: prompts, files, bytes of them, seconds and memory of encoding, opening and reading."""
    (folder / "nowhere").mkdir()
    (folder / "nowhere/model_index.json").write_text("{}")
    config = GeneratorConfig(family="benchmarks.embeddings:Drawn", path="nowhere", height=8, width=8)
    prompts = [Prompt(prompt_id(text), text, {}) for text in (f"scene {number}" for number in range(count))]
    source = folder / "train.jsonl"
    with source.open("w", encoding="utf-8") as stream:
        for prompt in prompts:
            stream.write(json.dumps({"id": prompt.id, "text": prompt.text, "metadata": {}}) + "\n")
    before, start = own_memory(), time.perf_counter()
    Drawn.most = before
    files = encode_prompt_file(config, folder, source, folder / "train.safetensors", {})
    encoded, start, encoding = time.perf_counter() - start, time.perf_counter(), Drawn.most - before
    before = own_memory()
    embeddings = load_embeddings(files[0], prompts)
    opened, start, index = time.perf_counter() - start, time.perf_counter(), own_memory() - before
    before = most = own_memory()
    for update in range(_UPDATES):
        rows = [embeddings[prompts[(update * 997 + number) % count].id] for number in range(_PROMPTS)]
        most = max(most, own_memory())
        del rows
    read = (time.perf_counter() - start) / _UPDATES
    size = sum(file.stat().st_size for file in files)
    return [
        f"{count:,}",
        str(len(files)),
        f"{size / 2**20:.0f} MiB",
        f"{encoded:.1f} s",
        f"{encoding / 2**20:.1f} MiB",
        f"{opened:.1f} s",
        f"{index / 2**20:.1f} MiB",
        f"{1000 * read:.1f} ms",
        f"{(most - before) / 2**20:.1f} MiB",
    ]


def main(counts: Sequence[int]) -> None:
    """Print the table."""
    print("| prompts | files | on disk | encoding | memory | opening | memory | an update's 8 | memory |")
    print("|" + "---|" * 9)
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            print("| " + " | ".join(measure(count, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    # As the adapter's import path finds it: there must be one class that counts.
    from benchmarks.embeddings import main

    main([int(text) for text in sys.argv[1:]])
