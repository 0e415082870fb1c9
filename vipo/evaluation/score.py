"""The `score` stage: rewards, change against the base, and allocation maps of samples that lie there as pictures.

One batch of pictures is in memory at a time, and one network: what measures goes over all of them before the next one
is loaded.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from vipo.config.compose import dump_config
from vipo.config.run import Config
from vipo.evaluation.held_out import (
    FACTS,
    EvaluationError,
    HeldOut,
    check_facts,
    held_out_batches,
    read_samples,
    samples_folder,
)
from vipo.evaluation.left_out import told
from vipo.evaluation.measures import Batch, Measure, Measured, measures_of, tried
from vipo.evaluation.shares import Share, Work
from vipo.evaluation.summary import summarize
from vipo.memory import free
from vipo.prompts.vbench import is_measured
from vipo.provenance import hashed, is_made, record_stage, verify_outputs
from vipo.provenance.files import atomic_file
from vipo.provenance.parts import load_tensors, save_tensors
from vipo.provenance.records import PROVENANCE, read_processes
from vipo.provenance.reward_files import OF
from vipo.rewards import check_identities
from vipo.tracking.progress import progress_bar

log = logging.getLogger(__name__)


def score_run(config: Config, root: Path, experiment: Path, share: Share | None = None, wait: float = 0) -> None:
    """Score one run's samples into ``evaluation/<arm>-s<seed>``, against those of the experiment's base.

    Writes ``config.yaml`` (resolved, complete), ``scores.parquet`` (one row per update and sample), ``summary.json``
    and ``maps.safetensors``: allocation maps of the first final samples (`vipo.evaluation.measures.MAPPED`), ``(h, w)``
    or ``(T_lat, h, w)``. A video's file says in its metadata `frame_groups` which frames ``[first, last + 1]`` each
    latent frame stands for (JSON). What is there already, of this work, is not made again.

    Args:
        config, root, experiment, share, wait: as of `vipo.evaluation.sample.sample_run`.

    Raises:
        EvaluationError: samples are missing, damaged or of another configuration, or a reward scores none of them.
    """
    output, identity = experiment / "evaluation" / config.run_name, config.evaluation_identity()
    prompts = experiment / "prompts" / "eval.jsonl"
    facts = _check_samples(config, experiment, root)
    if not config.is_base:
        _check_samples(config.as_base(), experiment, root)
    pictures, reference = (samples_folder(experiment, own.run_name) for own in (config, config.as_base()))
    batches = held_out_batches(prompts, config)
    found = [prompts, *dict.fromkeys(folder / name for folder in (pictures, reference) for name in (FACTS, "pictures"))]
    measures = measures_of(config, root, facts, batches)
    measured = tried(config, root, [sample for batch in batches for sample in batch])
    processes = measured.processes
    if processes and not config.is_base:
        record = experiment / "runs" / config.run_name / PROVENANCE
        check_identities(read_processes(record), processes, record)
    inputs = hashed("score", [*found, *measured.backbone], root)
    for label, files in measured.rewards.items():
        inputs += [{**entry, OF: f"reward {label}"} for entry in hashed("score", files, root)]
    if is_made("score", output, inputs, identity, root, processes):
        log.info("%s: its samples are scored already, in %s", config.run_name, output)
        return
    # Parts that another process scored are no parts of this.
    work = Work(output, {**identity, "reward_processes": processes} if processes else identity, inputs)

    def read(update: int, number: int) -> Batch:
        samples, video = batches[number], config.generator.frames is not None
        base = read_samples(reference / "pictures", 0, samples, video=video)
        same = config.is_base and update == 0
        images = base if same else read_samples(pictures / "pictures", update, samples, video=video)
        return Batch(update, samples, images, base)

    if share is not None:
        with work.shared(share, wait):
            _measure_missing(config, measures, read, work, share)
        return
    names = ("config.yaml", "scores.parquet", "summary.json", "maps.safetensors")
    with record_stage(
        "score",
        output,
        inputs=inputs,
        outputs=[output / name for name in names],
        config=identity,
        seeds=[config.seed, config.evaluation.seed],
        root=root,
        experiment=experiment,
        processes=processes,
    ):
        with work.shared(Share(), wait):
            _measure_missing(config, measures, read, work, Share())
        scores = _table(config, facts["updates"], batches, measures[1:], work)
        _tell_left_out(config, scores, batches, measures[1:], work)
        maps = _together(measures[0], work)
        with atomic_file(output / "maps.safetensors") as path:
            groups = facts["frame_groups"]
            save_file(maps, path, None if groups is None else {"frame_groups": json.dumps(groups)})
        with atomic_file(output / "config.yaml") as path:
            path.write_text(dump_config(config), encoding="utf-8")
        with atomic_file(output / "scores.parquet") as path:
            scores.to_parquet(path, index=False)
        with atomic_file(output / "summary.json") as path:
            path.write_text(json.dumps(summarize(scores), indent=1, sort_keys=True) + "\n")
        work.discard()


def _check_samples(config: Config, experiment: Path, root: Path) -> dict[str, Any]:
    """What the samples of a run say of themselves.

    Raises:
        EvaluationError: they are missing, damaged, or of another configuration.
    """
    folder = samples_folder(experiment, config.run_name)
    again = f"run 'vipo evaluate --only sample' of {config.run_name} {'again' if folder.is_dir() else 'first'}"
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
        made = facts["sampling"]
        check_facts(facts)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise EvaluationError(f"{folder}: holds no samples that can be read ({error}); {again}") from error
    wanted = config.sampling_identity()
    if made != wanted:
        changed = ", ".join(key for key in wanted if not isinstance(made, dict) or made.get(key) != wanted[key])
        raise EvaluationError(
            f"{folder}: drawn with another configuration ({changed} changed); {again}. All arms are compared with one "
            "base, drawn once: an arm that draws otherwise is another experiment's"
        )
    if (folder / PROVENANCE).is_file() and (damaged := verify_outputs(folder / PROVENANCE, root)):
        raise EvaluationError(f"{folder}: not as the stage left it: {'; '.join(damaged[:3])}; {again}")
    return facts


def _measure_missing(
    config: Config,
    measures: Sequence[Measure],
    read: Callable[[int, int], Batch],
    work: Work,
    share: Share,
) -> None:
    own = {measure.name: share.of(measure.parts) for measure in measures}
    holding = {measure.file(*part): measure.holds(*part) for measure in measures for part in own[measure.name]}
    there = work.present(holding, lambda path: _opened(path, holding[path.name]))
    wanted = {
        measure.name: [part for part in own[measure.name] if measure.file(*part) not in there] for measure in measures
    }
    total = sum(map(len, wanted.values()))
    with progress_bar(total=total, description=f"{config.run_name}: scores", unit="batch") as progress:
        for measure in measures:
            if not wanted[measure.name]:
                continue
            with measure.opened() as measured:
                for part in wanted[measure.name]:
                    found = {name: values.contiguous() for name, values in measured(read(*part)).items()}
                    save_tensors(found, work.parts / measure.file(*part))
                    progress.update(1)
            # Else its network is there while the next one is loaded, and frozen with what stays.
            del measured
            free(config.generator.device)


def _opened(path: Path, holds: Mapping[str, int | None]) -> None:
    values = load_tensors(path)
    if values.keys() != holds.keys():
        raise ValueError("it holds other values")
    for name, value in values.items():
        if (count := holds[name]) is not None and value.shape != (count,):
            raise ValueError(f"it holds {name!r} of shape {tuple(value.shape)}")
        # NaN of a reward: it has no score there.
        if bool(value.isinf().any() if name.startswith("reward/") else ~value.isfinite().all()):
            raise ValueError(f"its {name!r} is not finite")


def _tell_left_out(
    config: Config,
    scores: pd.DataFrame,
    batches: Sequence[Sequence[HeldOut]],
    measures: Sequence[Measure],
    work: Work,
) -> None:
    """Warn of samples that a reward has no score of, and refuse one that has none at all.

    Raises:
        EvaluationError: that one; its parts are measured again the next time.
    """
    without: list[str] = []
    metadata = {sample.prompt.id: sample.prompt.metadata for batch in batches for sample in batch}
    for measure in measures:
        for column in measure.holds(*measure.parts[0]):
            if bool(scores[column].isna().all()):
                without.append(repr(column.removeprefix("reward/")))
                for part in measure.parts:
                    (work.parts / measure.file(*part)).unlink(missing_ok=True)
                continue
            asked = [is_measured(column.removeprefix("reward/"), metadata[id_]) for id_ in scores["prompt_id"]]
            if note := told(scores[asked], column):
                log.warning("%s: %s: %s", config.run_name, column, note)
    if without:
        raise EvaluationError(
            f"reward {', '.join(without)} is not finite for any of the {len(scores)} samples of {config.run_name}; "
            "mend it, or leave it out of evaluation.rewards"
        )


def _together(measure: Measure, work: Work) -> Measured:
    found: Measured = {}
    for part in measure.parts:
        found |= load_tensors(work.parts / measure.file(*part))
    return found


def _table(
    config: Config,
    updates: Sequence[int],
    batches: Sequence[Sequence[HeldOut]],
    measures: Sequence[Measure],
    work: Work,
) -> pd.DataFrame:
    """One row per update and sample: identifiers, every reward, and the change against the base."""
    samples, tables = [sample for batch in batches for sample in batch], []
    for update in updates:
        columns: dict[str, Any] = {
            "run": config.run_name,
            "arm": config.arm,
            "seed": config.seed,
            "update": update,
            "final": update == updates[-1],
            "prompt_id": [s.prompt.id for s in samples],
            "prompt": [s.prompt.text for s in samples],
            "sample": [s.number for s in samples],
            **({} if config.protocol is None else {"protocol": config.protocol_title}),
        }
        for measure in measures:
            parts = [load_tensors(work.parts / measure.file(update, number)) for number in range(len(batches))]
            # Not in the order of the file: safetensors has one of its own.
            for name in measure.holds(update, 0):
                columns[name] = torch.cat([part[name] for part in parts]).double().numpy()
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)
