"""The demo's prompt files, written from the scenes' own captions."""

import json
from pathlib import Path

from vipo.demo.scenes import one_object_captions


def write_demo_prompts(folder: Path) -> Path:
    """Write ``colourless.jsonl``: every one-object caption that names no colour, with what it claims, sorted.

    Args:
        folder: created where missing; ``data/prompts`` holds the committed copy.

    Returns:
        The file's path.
    """
    rows = sorted(one_object_captions(named_color=False), key=lambda row: row[0])
    path = folder / "colourless.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text, **claims}) + "\n" for text, claims in rows), encoding="utf-8")
    return path
