"""`prepare`: from a prompt source to cleaned, deduplicated, split prompts with a manifest."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vipo.config.prompts import PromptsConfig
from vipo.prompts.prompt import Prompt, PromptError, clean_text, duplicate_key, is_blank, is_evaluation, prompt_id
from vipo.prompts.sources import json_line, missing_key, read_source
from vipo.provenance.files import atomic_file, file_sha256

_REASONS = ("blank", "too_long", "exact_duplicate", "whitespace_duplicate", "case_duplicate")

Halves = Callable[[Sequence[Prompt], Sequence[Prompt]], None]


def prepare_prompts(config: PromptsConfig, root: Path, output: Path, accept: Halves | None = None) -> dict[str, Any]:
    """Clean and split a prompt source into ``train.jsonl``, ``eval.jsonl`` and ``manifest.json``.

    Of duplicates the first row is kept; texts that differ in letter case are none unless ``config.ignore_case`` says
    so, for the case of a text that is to be drawn is its meaning. Prompts lie in the order of their ids, which is as
    good as shuffled: the first n of a file are a fair sample of it. The three files replace older ones only when all
    are written whole, the manifest last: its hashes tell whether the others belong to it.

    Args:
        config: source, key of the prompt, share held out and length limit.
        root: folder that a relative ``config.source`` starts at.
        output: folder to write into; created where missing.
        accept: is given both halves, train and eval, before anything is written, and raises where they will not do.

    Returns:
        The manifest: ``source``, ``source_sha256``, ``config``, ``counts`` (rows, kept, train, eval),
        ``dropped`` (row numbers by reason) and ``files`` (SHA-256 by name).

    Raises:
        PromptError: the source cannot be used (see `read_source`), a row has no prompt under the key, a half of
            the split is empty (evaluation may be where ``eval_share`` is 0).
        StorageError: `output` cannot be written.
    """
    source = read_source(config.source, config.text_key, root)
    dropped: dict[str, list[int]] = {reason: [] for reason in _REASONS}
    lines: dict[str, str] = {}
    prompts: dict[str, Prompt] = {}
    raw_seen: set[str] = set()
    seen: set[str] = set()
    for number, row in source.rows:
        raw = _prompt_of(config, number, row)
        text = clean_text(raw)
        key = duplicate_key(text) if config.ignore_case else text
        if is_blank(text):
            dropped["blank"].append(number)
        elif len(text) > config.max_characters:
            dropped["too_long"].append(number)
        elif raw in raw_seen:
            dropped["exact_duplicate"].append(number)
        elif (identity := prompt_id(text)) in lines:
            dropped["whitespace_duplicate"].append(number)
        elif key in seen:
            dropped["case_duplicate"].append(number)
        else:
            seen.add(key)
            metadata = {name: value for name, value in row.items() if name != config.text_key}
            lines[identity] = json_line(config.source, number, {"id": identity, "text": text, "metadata": metadata})
            prompts[identity] = Prompt(identity, text, metadata)
        raw_seen.add(raw)
    held_out = {identity: is_evaluation(identity, config.eval_share) for identity in sorted(lines)}
    files = {
        "train.jsonl": "".join(lines[identity] for identity, out in held_out.items() if not out),
        "eval.jsonl": "".join(lines[identity] for identity, out in held_out.items() if out),
    }
    evaluation = sum(held_out.values())
    counts = {"rows": len(source.rows), "kept": len(lines), "train": len(lines) - evaluation, "eval": evaluation}
    _check_split(config, counts, dropped)
    if accept is not None:
        halves = [[prompts[identity] for identity, out in held_out.items() if out == half] for half in (False, True)]
        accept(*halves)
    manifest = {
        "source": config.source,
        "source_sha256": source.sha256,
        "config": config.model_dump(mode="json"),
        "counts": counts,
        "dropped": dropped,
        "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
    }
    _write(output, {"manifest.json": json.dumps(manifest, indent=1, sort_keys=True) + "\n", **files})
    return manifest


def check_prompts(folder: Path, config: PromptsConfig) -> None:
    """Check that prepared prompts are whole and were made with this configuration.

    Args:
        folder: what `prepare_prompts` wrote into.
        config: the configuration that they should have been made with.

    Raises:
        PromptError: the manifest is missing or damaged, names another configuration, or a file is not the one that
            it names.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        made, files = manifest["config"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PromptError(f"{path}: cannot be read ({error}); run 'vipo prepare' first") from error
    wanted = config.model_dump(mode="json")
    if made != wanted:
        told = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise PromptError(
            f"{folder}: made with another configuration than this run's ({told}); "
            "run the stage 'prepare' again with it, or choose another results folder"
        )
    for name, sha256 in files.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise PromptError(f"{folder / name}: is not the file that {path.name} names; run 'vipo prepare' again")


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file that `prepare_prompts` wrote, in its order; an empty file gives an empty list.

    Raises:
        PromptError: the file is missing, a line is not a prepared prompt, an id is not that of its text, or
            occurs twice.
    """
    try:
        lines = path.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read ({error}); run 'vipo prepare' first") from error
    if lines.pop():
        raise PromptError(f"{path}: its last line is cut off; run 'vipo prepare' again")
    prompts = [_prepared(f"{path}: line {number}", line) for number, line in enumerate(lines, start=1)]
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise PromptError(f"{path}: a prompt occurs twice; run 'vipo prepare' again")
    return prompts


def _prompt_of(config: PromptsConfig, number: int, row: Mapping[str, Any]) -> str:
    if config.text_key not in row:
        raise missing_key(f"{config.source}: row {number}", config.text_key, [str(key) for key in row])
    value = row[config.text_key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(
            f"{config.source}: row {number}: {config.text_key!r} holds a {type(value).__name__}, a prompt is text; "
            "set prompts.text_key to the key that holds it"
        )
    return value


def _check_split(config: PromptsConfig, counts: Mapping[str, int], dropped: Mapping[str, list[int]]) -> None:
    if not counts["kept"]:
        reasons = ", ".join(f"{len(rows)} {reason}" for reason, rows in dropped.items() if rows) or "it has no rows"
        raise PromptError(f"{config.source}: no prompt is left of {counts['rows']} rows ({reasons})")
    for half in ("train", "eval"):
        if not counts[half] and not (half == "eval" and config.eval_share == 0):
            raise PromptError(
                f"{config.source}: prompts.eval_share {config.eval_share} leaves no prompt for {half} "
                f"of {counts['kept']}; change it or add prompts"
            )


def _write(output: Path, files: Mapping[str, str]) -> None:
    # Every file is complete before the first one is renamed into place. The stack unwinds backwards, so that the
    # manifest, which comes first here, is renamed last.
    with contextlib.ExitStack() as stack:
        for name, text in files.items():
            stack.enter_context(atomic_file(output / name)).write_bytes(text.encode())


def _prepared(where: str, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: is not JSON ({error}); run 'vipo prepare' again") from error
    if not isinstance(row, dict) or set(row) != {"id", "text", "metadata"}:
        raise PromptError(f"{where}: is not a prepared prompt (id, text, metadata); run 'vipo prepare' on it first")
    if not isinstance(row["text"], str) or not isinstance(row["metadata"], dict):
        raise PromptError(f"{where}: text must be a string and metadata an object; run 'vipo prepare' again")
    if row["id"] != prompt_id(row["text"]):
        raise PromptError(
            f"{where}: id {row['id']!r} is not that of its text; edit the source and run 'vipo prepare' again"
        )
    return Prompt(row["id"], row["text"], row["metadata"])
