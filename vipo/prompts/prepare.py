"""`prepare`: from a prompt source to cleaned, deduplicated, split prompts with a manifest."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vipo.config.prompts import PromptsConfig
from vipo.prompts.filters import Filter, load_filters
from vipo.prompts.prompt import (
    Prompt,
    PromptError,
    categories_of,
    clean_text,
    duplicate_key,
    is_blank,
    is_evaluation,
    prompt_id,
)
from vipo.prompts.sources import SET_KEY, Source, json_line, missing_key, read_source
from vipo.provenance.files import atomic_file, file_sha256

_REASONS = ("blank", "too_long", "exact_duplicate", "whitespace_duplicate", "case_duplicate")

Halves = Callable[[Sequence[Prompt], Sequence[Prompt]], None]
Tokens = Callable[[str], int]


def prepare_prompts(
    config: PromptsConfig, root: Path, output: Path, accept: Halves | None = None, tokens: Tokens | None = None
) -> dict[str, Any]:
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
        tokens: how many tokens the generator makes of a text, where ``config.filters.max_tokens`` asks.

    Returns:
        The manifest: ``source``, ``source_sha256``, ``config``, ``counts`` (rows, kept, train, eval),
        ``dropped`` (row numbers by reason) and ``files`` (SHA-256 by name).

    Raises:
        PromptError: the source cannot be used (see `read_source`), a row has no prompt under the key, a half of
            the split is empty (evaluation may be where ``eval_share`` is 0).
        StorageError: `output` cannot be written.
    """
    split = split_prompts(config, root, tokens)
    train, held_out = split.train, split.held_out
    files = {"train.jsonl": "".join(train.lines.values()), "eval.jsonl": "".join(held_out.lines.values())}
    if accept is not None:
        accept(list(train.prompts.values()), list(held_out.prompts.values()))
    manifest = {
        "source": config.source,
        "source_sha256": train.sha256,
        "config": config.identity(),
        "counts": split.counts,
        "dropped": train.dropped,
        "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
        **split.others,
    }
    _write(output, {"manifest.json": json.dumps(manifest, indent=1, sort_keys=True) + "\n", **files})
    return manifest


@dataclass(frozen=True)
class Cleaned:
    """What is left of a source, in the order of the prompts' ids.

    Attributes:
        rows: how many it had.
        sha256: of the source.
        lines: prepared prompts by id, as they are written.
        prompts: the same.
        dropped: row numbers by reason.
    """

    rows: int
    sha256: str
    lines: dict[str, str]
    prompts: dict[str, Prompt]
    dropped: dict[str, list[int]]

    def split(self, second: Callable[[str], bool]) -> tuple["Cleaned", "Cleaned"]:
        """The prompts whose id `second` does not choose, and those that it does."""
        halves = [[identity for identity in self.lines if bool(second(identity)) == half] for half in (False, True)]
        first, other = (
            replace(self, lines={i: self.lines[i] for i in half}, prompts={i: self.prompts[i] for i in half})
            for half in halves
        )
        return first, other


@dataclass(frozen=True)
class Split:
    """Both halves of the prompts.

    Attributes:
        train, held_out: of one source its two parts, else each of its own source.
        counts: rows, kept, train and eval.
        others: what the manifest says of a source of its own for what is held out.
    """

    train: Cleaned
    held_out: Cleaned
    counts: dict[str, int]
    others: dict[str, Any]


def split_prompts(config: PromptsConfig, root: Path, tokens: Tokens | None = None) -> Split:
    """Read, clean and split a prompt source as `prepare_prompts` does; writes nothing.

    Raises:
        PromptError: as there.
    """
    filters = load_filters(config.filters, root, tokens)
    found = _cleaned(config, read_source(config.source, config.text_key, root), filters)
    others: dict[str, Any] = {}
    if config.eval is None:
        train, held_out = found.split(lambda identity: is_evaluation(identity, config.eval_share))
        counts = {"rows": found.rows, "kept": len(found.lines), "train": len(train.lines), "eval": len(held_out.lines)}
    else:
        own = config.model_copy(update={"source": config.eval.source, "text_key": config.eval.text_key})
        source = read_source(own.source, own.text_key, root, "prompts.eval")
        held_out = _cleaned(own, source, filters, config.eval.categories)
        leaked, train = found.split(lambda identity: identity not in held_out.lines)
        counts = {"rows": found.rows, "kept": len(train.lines), "train": len(train.lines), "eval": len(held_out.lines)}
        others = {
            "eval": {
                "source": own.source,
                "source_sha256": held_out.sha256,
                "rows": held_out.rows,
                "dropped": held_out.dropped,
                "left_out_of_train": sorted(leaked.lines),
            }
        }
    _check_split(config, counts, found.dropped)
    return Split(train, held_out, counts, others)


def _cleaned(
    config: PromptsConfig,
    source: Source,
    filters: Sequence[tuple[str, Filter]],
    categories: Sequence[str] = (),
) -> Cleaned:
    dropped: dict[str, list[int]] = {reason: [] for reason in (*_REASONS, *(name for name, _ in filters))}
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
        elif categories and not set(categories_of(row)) & set(categories):
            dropped.setdefault("other_category", []).append(number)
        elif (reason := next((name for name, drops in filters if drops(text)), None)) is not None:
            dropped[reason].append(number)
        else:
            seen.add(key)
            metadata = {name: value for name, value in row.items() if name != config.text_key}
            lines[identity] = json_line(config.source, number, {"id": identity, "text": text, "metadata": metadata})
            prompts[identity] = Prompt(identity, text, metadata)
        raw_seen.add(raw)
    order = sorted(lines)
    found = {identity: lines[identity] for identity in order}
    return Cleaned(len(source.rows), source.sha256, found, {i: prompts[i] for i in order}, dropped)


def check_prompts(folder: Path, config: PromptsConfig) -> dict[str, int]:
    """Check that prepared prompts are whole and were made with this configuration.

    Args:
        folder: what `prepare_prompts` wrote into.
        config: the configuration that they should have been made with.

    Returns:
        How many there are in ``train`` and in ``eval``.

    Raises:
        PromptError: the manifest is missing or damaged, names another configuration, or a file is not the one that
            it names.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        made, files = manifest["config"], dict(manifest["files"])
        counts = {half: int(manifest["counts"][half]) for half in ("train", "eval")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PromptError(f"{path}: cannot be read ({error}); run 'vipo prepare' first") from error
    wanted = config.identity()
    if made != wanted:
        told = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise PromptError(
            f"{folder}: made with another configuration than this run's ({told}); "
            "run the stage 'prepare' again with it, or choose another results folder"
        )
    for name, sha256 in files.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise PromptError(f"{folder / name}: is not the file that {path.name} names; run 'vipo prepare' again")
    return counts


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
            f"{SET_KEY} the key that holds it"
        )
    return value


def _check_split(config: PromptsConfig, counts: Mapping[str, int], dropped: Mapping[str, list[int]]) -> None:
    if not counts["kept"]:
        reasons = ", ".join(f"{len(rows)} {reason}" for reason, rows in dropped.items() if rows) or "it has no rows"
        raise PromptError(f"{config.source}: no prompt is left of {counts['rows']} rows ({reasons})")
    for half in ("train", "eval"):
        if counts[half] or (half == "eval" and not config.holds_out):
            continue
        if config.eval is not None:
            named = config.eval.source if half == "eval" else config.source
            chosen = config.eval.categories if half == "eval" else ()
            of = f" (prompts.eval.categories: {', '.join(chosen)})" if chosen else ""
            raise PromptError(
                f"{named}: no prompt is left of it for {half}{of}; add prompts, or change "
                f"{'the categories or ' * bool(chosen)}prompts.filters"
            )
        raise PromptError(
            f"{config.source}: prompts.eval_share {config.eval_share} leaves no prompt for {half} of {counts['kept']}; "
            "change it or add prompts"
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
