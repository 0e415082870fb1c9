"""Whether a run is finished, told from its record and the bytes beside it. Imports nothing that trains."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vipo.config.run import Config
from vipo.config.values import config_hash
from vipo.provenance.records import (
    PROVENANCE,
    ProvenanceError,
    absolute_path,
    entry_files,
    files_below,
    is_unchanged,
    read_provenance,
)
from vipo.training.ranks import is_rank


def finished_weights(config: Config, root: Path, experiment: Path) -> Path | None:
    """Folder of the final weights of a run that is finished just as it is configured now; None where work is left.

    Nothing is taken on trust: the record is of this configuration, and what the run read and wrote is hashed.

    Args:
        config: the run.
        root: repository root.
        experiment: ``results/<experiment>``.
    """
    run = f"runs/{config.run_name}"
    folder = experiment / run
    # Ranks decide together, and not here.
    if is_rank() or config.is_base or not (folder / PROVENANCE).is_file():
        return None
    try:
        record = read_provenance(folder / PROVENANCE)
        if record["stage"] != "train" or record["config_sha256"] != config_hash(config.training_identity()):
            return None
        inputs, outputs = (list(_located(record, part, run, experiment)) for part in ("inputs", "outputs"))
        wanted = {str(experiment / "prompts/train.jsonl"), str(experiment / "embeddings/train.safetensors")}
        generator = (root / config.generator.path).resolve()
        if generator.is_dir():
            wanted.add(str(generator))
        if not {str(path) for path in map(absolute_path, map(Path, wanted))} <= _paths(inputs, root):
            return None
        written = {path for entry in outputs for path in _paths([{"path": name} for name in entry_files(entry)], root)}
        if written != {str(absolute_path(path)) for path in _outputs(folder)}:
            return None
        if not all(is_unchanged(entry, root) for entry in (*outputs, *inputs)):
            return None
    # A record that was edited into something else: training again mends it.
    except (ProvenanceError, LookupError, TypeError, ValueError, AttributeError):
        return None
    kept = [folder / "weights", *(folder / "updates" / f"{update:06d}" for update in config.training.save_at)]
    return kept[0] if all(path.is_dir() for path in kept) else None


def next_command(config: Config, results: Path) -> str:
    """What to type after a run's training."""
    resolved = results / config.experiment.name / "runs" / config.run_name / "config.yaml"
    return f"vipo evaluate --config {shlex.quote(str(resolved))} --results {shlex.quote(str(results))}"


def _located(record: Mapping[str, Any], part: str, run: str, experiment: Path) -> Iterator[dict[str, Any]]:
    """Recorded inputs or outputs where they are now, should the results have been copied or moved."""
    first = record["outputs"][0]["path"]
    prefix = first.removesuffix(f"{run}/config.yaml")
    if prefix == first:
        raise ProvenanceError(f"{first}: is not of {run}")
    for entry in record[part]:
        inside = bool(prefix) and entry["path"].startswith(prefix)
        here = absolute_path(experiment / entry["path"].removeprefix(prefix)) if inside else entry["path"]
        yield {**entry, "path": str(here)}


def _paths(entries: list[dict[str, Any]], root: Path) -> set[str]:
    return {str(absolute_path(root / entry["path"])) for entry in entries}


def _outputs(folder: Path) -> Iterator[Path]:
    yield from (folder / "config.yaml", folder / "metrics.jsonl")
    for name in ("weights", "updates"):
        yield from (folder / name / file for file in files_below(folder / name))
