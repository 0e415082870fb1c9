"""The `score` stage: rewards, change against the base, and allocation maps of samples that lie there as pictures.

One batch of pictures is in memory at a time, and one network: what measures goes over all of them before the next one
is loaded.
"""

import contextlib
import gc
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.config.compose import dump_config
from vipo.config.reward import RewardSpec
from vipo.config.run import Config
from vipo.demo.scenes import foreground
from vipo.evaluation.held_out import EvaluationError, HeldOut, held_out_batches, read_samples, sample_name
from vipo.evaluation.sample import FACTS, samples_folder
from vipo.evaluation.shares import Share, Work
from vipo.evaluation.summary import summarize
from vipo.perception import PerceptualStructuring, load_backbone
from vipo.provenance import hashed, is_made, record_stage, verify_outputs
from vipo.provenance.files import atomic_file
from vipo.provenance.records import PROVENANCE, read_provenance
from vipo.rewards import check_identities, identities, in_use, load_reward, score, weight_files
from vipo.tracking.progress import progress_bar

log = logging.getLogger(__name__)

#: Samples of the final weights whose maps are kept, the first ones: the report shows some of them.
MAPPED = 512


@dataclass(frozen=True)
class Batch:
    """Samples of one update, with their pictures and the base's, ``(N, [T,] 3, H, W)`` in [0, 1]."""

    update: int
    samples: Sequence[HeldOut]
    images: Tensor
    base: Tensor

    @property
    def texts(self) -> list[str]:
        """Prompts."""
        return [sample.prompt.text for sample in self.samples]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """What the prompts carry."""
        return [sample.prompt.metadata for sample in self.samples]


Measured = dict[str, Tensor]


@dataclass(frozen=True)
class Measure:
    """What is measured on every batch of `parts`: pairs of an update and the number of a batch.

    Attributes:
        name: file-safe.
        opened: loads what measures, for the block, and gives it.
    """

    name: str
    parts: Sequence[tuple[int, int]]
    opened: Callable[[], AbstractContextManager[Callable[[Batch], Measured]]]

    def file(self, update: int, number: int) -> str:
        """Of one part."""
        return f"{self.name}-{update}-{number}.safetensors"


def score_run(config: Config, root: Path, experiment: Path, share: Share | None = None, wait: float = 0) -> None:
    """Score one run's samples into ``evaluation/<arm>-s<seed>``, against those of the experiment's base.

    Writes ``config.yaml`` (resolved, complete), ``scores.parquet`` (one row per update and sample), ``summary.json``
    and ``maps.safetensors``: allocation maps of the first `MAPPED` final samples, ``(h, w)`` or ``(T_lat, h, w)``. A
    video's file says in its metadata `frame_groups` which frames ``[first, last + 1]`` each latent frame stands for
    (JSON). What is there already, of this work, is not made again.

    Args:
        config, root, experiment, share, wait: as of `vipo.evaluation.sample.sample_run`.

    Raises:
        EvaluationError: samples are missing, damaged or of another configuration, or a reward is not finite.
    """
    output, identity = experiment / "evaluation" / config.run_name, config.evaluation_identity()
    prompts = experiment / "prompts" / "eval.jsonl"
    facts = _check_samples(config, experiment, root)
    if not config.is_base:
        _check_samples(config.as_base(), experiment, root)
    pictures, reference = (samples_folder(experiment, own.run_name) for own in (config, config.as_base()))
    batches = held_out_batches(prompts, config)
    found = [prompts, *dict.fromkeys(folder / name for folder in (pictures, reference) for name in (FACTS, "pictures"))]
    measures = _measures(config, root, facts, batches)
    files, processes = _tried(config, root, batches[0][0])
    if processes and not config.is_base:
        record = experiment / "runs" / config.run_name / PROVENANCE
        trained = read_provenance(record).get("reward_processes", {}) if record.is_file() else {}
        check_identities(trained, processes, record)
    inputs = hashed("score", [*found, *files], root)
    if is_made("score", output, inputs, identity, root):
        log.info("%s: its samples are scored already, in %s", config.run_name, output)
        return
    work = Work(output, identity, inputs)

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
    ) as told:
        if processes:
            told["reward_processes"] = processes
        with work.shared(Share(), wait):
            _measure_missing(config, measures, read, work, Share())
        scores = _table(config, facts["updates"], batches, measures[1:], work)
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


# ---- what is measured ---------------------------------------------------------------------------------------------


def _measures(config: Config, root: Path, facts: dict[str, Any], batches: Sequence[Sequence[HeldOut]]) -> list[Measure]:
    """Maps, then every column of the table in order."""
    updates, count = facts["updates"], len(batches)
    every = [(update, number) for update in updates for number in range(count)]
    mapped = -(-MAPPED // config.evaluation.batch)
    final = [(updates[-1], number) for number in range(min(count, mapped))]
    scene = config.generator.frames is None and all(
        "objects" in sample.prompt.metadata for batch in batches for sample in batch
    )
    rewards = [
        Measure(f"reward{number}", every, partial(_reward, spec, config))
        for number, spec in enumerate(config.evaluation.rewards)
    ]
    change = Measure("change", every, partial(_change, scene))
    return [Measure("maps", final, partial(_maps, config, root, facts)), *rewards, change]


@contextlib.contextmanager
def _maps(config: Config, root: Path, facts: dict[str, Any]) -> Iterator[Callable[[Batch], Measured]]:
    device, groups = config.generator.device, facts["frame_groups"]
    structuring = PerceptualStructuring(load_backbone(config.perception, device, root), config.perception)
    structuring.preflight((config.generator.height, config.generator.width))
    spans = None if groups is None else [range(first, last) for first, last in groups]

    def measure(batch: Batch) -> Measured:
        found = structuring(batch.images.to(device), tuple(facts["grid"]), spans)
        found.check()
        named = zip(batch.samples, found.maps, strict=True)
        return {sample_name(batch.update, sample): heat.cpu().clone() for sample, heat in named}

    yield measure


@contextlib.contextmanager
def _reward(spec: RewardSpec, config: Config) -> Iterator[Callable[[Batch], Measured]]:
    device = config.generator.device
    reward = load_reward(spec.name, device, spec.options)

    def measure(batch: Batch) -> Measured:
        values = score(spec.label, reward, batch.images.to(device), batch.texts, batch.metadata)
        if not bool(values.isfinite().all()):
            worst = batch.samples[int((~values.isfinite()).nonzero()[0])]
            raise EvaluationError(
                f"reward {spec.label!r} is not finite for {worst.prompt.text!r}, sample {worst.number}, update "
                f"{batch.update}; mend it, or leave it out of evaluation.rewards"
            )
        return {f"reward/{spec.label}": values}

    with in_use(reward):
        yield measure


@contextlib.contextmanager
def _change(scene: bool) -> Iterator[Callable[[Batch], Measured]]:
    yield lambda batch: image_change(batch.images, batch.base, scene)


def image_change(images: Tensor, base: Tensor, scene: bool) -> dict[str, Tensor]:
    """Mean absolute pixel change against the base's sample of the same prompt and noise, ``(N,)`` each in [0, 1].

    Args:
        images, base: ``(N, 3, H, W)``, or videos ``(N, T, 3, H, W)``.
        scene: whether the base's object can be told from its background by the border's colour; then the change is
            also split into the base picture's foreground and background.
    """
    change = (images - base).abs().mean(dim=-3)
    result = {"change/total": change.mean(dim=tuple(range(1, change.ndim)))}
    if scene:
        inside = foreground(base).float()
        result["change/foreground"] = (change * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp_min(1)
        result["change/background"] = (change * (1 - inside)).sum(dim=(1, 2)) / (1 - inside).sum(dim=(1, 2)).clamp_min(
            1
        )
    return result


def _tried(config: Config, root: Path, sample: HeldOut) -> tuple[list[Path], dict[str, dict[str, Any]]]:
    """Files that the measures read their networks from, and what rewards elsewhere tell of themselves.

    One after the other is loaded, tried on a blank, and gone again, before a picture is read: the last one may be the
    one that cannot be run.
    """
    generator, device = config.generator, config.generator.device
    structuring = PerceptualStructuring(load_backbone(config.perception, device, root), config.perception)
    structuring.preflight((generator.height, generator.width))
    found = [] if structuring.backbone.source is None else [structuring.backbone.source]
    del structuring
    _free(device)
    processes: dict[str, dict[str, Any]] = {}
    blank = torch.zeros(1, *generator.sample_shape, device=device)
    for spec in config.evaluation.rewards:
        reward = load_reward(spec.name, device, spec.options)
        found += weight_files(reward)
        processes |= identities({spec.label: reward})
        with in_use(reward):
            score(spec.label, reward, blank, [sample.prompt.text], [sample.prompt.metadata])
        del reward
        _free(device)
    return found, processes


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


# ---- parts --------------------------------------------------------------------------------------------------------


def _measure_missing(
    config: Config,
    measures: Sequence[Measure],
    read: Callable[[int, int], Batch],
    work: Work,
    share: Share,
) -> None:
    there = work.present()
    wanted = {
        measure.name: [part for part in share.of(measure.parts) if measure.file(*part) not in there]
        for measure in measures
    }
    total = sum(map(len, wanted.values()))
    with progress_bar(total=total, description=f"{config.run_name}: scores", unit="batch") as progress:
        for measure in measures:
            if not wanted[measure.name]:
                continue
            with measure.opened() as measured:
                for part in wanted[measure.name]:
                    found = {name: values.contiguous() for name, values in measured(read(*part)).items()}
                    with atomic_file(work.parts / measure.file(*part)) as path:
                        save_file(found, path)
                    progress.update(1)
            _free(config.generator.device)


def _together(measure: Measure, work: Work) -> Measured:
    found: Measured = {}
    for part in measure.parts:
        found |= load_file(work.parts / measure.file(*part))
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
            **({} if config.protocol is None else {"protocol": config.protocol.title}),
        }
        for measure in measures:
            parts = [load_file(work.parts / measure.file(update, number)) for number in range(len(batches))]
            # In the order of its measure: safetensors keeps one of its own.
            for name in sorted(parts[0], key=_COLUMNS.index) if measure.name == "change" else parts[0]:
                columns[name] = torch.cat([part[name] for part in parts]).double().numpy()
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


_COLUMNS = ("change/total", "change/foreground", "change/background")
