"""Hand-over of a run: a folder that is ready for the Hub and that the stock pipeline loads.

Full fine-tuning gives a whole pipeline: the base's parts as the run read them, with the trained network in place of
the base's. LoRA gives ``pytorch_lora_weights.safetensors`` alone. For ComfyUI either is one file, under the names of
the family's original repository. Beside the weights: ``README.md`` (the model card),
the base's licence files, ``samples/``, ``provenance/`` and ``SHA256SUMS``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vipo.config.compose import dump_config
from vipo.config.run import Config
from vipo.config.training import EMA
from vipo.evaluation.left_out import left_out, on_common_samples
from vipo.evaluation.means import mean_score
from vipo.generators.finite import check_finite
from vipo.handover.base import base_licence, copy_file, copy_parts, find_base
from vipo.handover.card import CardSample, ScoreRow, model_card
from vipo.handover.comfyui import check_comfyui, write_comfyui
from vipo.handover.errors import ExportError
from vipo.provenance import atomic_folder, file_sha256, read_provenance, verify_outputs
from vipo.provenance.records import PROVENANCE, absolute_path
from vipo.reporting.inputs import read_scores
from vipo.reporting.runs import RunRecords, configured_difference, measured_columns, read_run, trained_direction


def export_run(
    path: Path,
    output: Path | None,
    root: Path,
    *,
    license_id: str | None = None,
    base_model: str | None = None,
    comfyui: bool = False,
) -> Path:
    """Write the hand-over folder of a trained and evaluated run; the same run gives the same bytes.

    Args:
        path: ``results/<experiment>/runs/<arm>-s<seed>``.
        output: folder that must be absent or empty; None: ``results/<experiment>/export/<run>``.
        root: repository root, where recorded paths start.
        license_id: the Hub's identifier of the licence; None: the one that the base's own card states.
        base_model: id on the Hub of a base that the run read from a folder.
        comfyui: write the weights as one file under original names instead of for diffusers.

    Returns:
        The folder.

    Raises:
        ExportError: the run or the base is not trained, not evaluated, not recorded here or not as recorded, the
            licence is not known, the base changed since, `output` is in use, or the trained weights belong to others
            than the base's own.
        ReportError, ConfigError, ProvenanceError: no run is there, or its files are damaged.
        NamesError: for ComfyUI, a family or a layer has no original name.
        GeneratorError: the base cannot be found, or the weights are not finite.
        StorageError: the disk refused a write.
    """
    run = read_run(path)
    target = run.experiment / "export" / run.name if output is None else absolute_path(output)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExportError(f"{target}: exists; remove it or choose another folder with --output")
    if run.config.is_base:
        raise ExportError(f"{path}: the base is the generator as it was; export a trained run")
    _check_whole(run.config)
    if comfyui:
        check_comfyui(run.config, root)
    reference = _checked(run, root)
    trained = {name.split("/", 1)[0] for name in _handed_over(run)}
    whole = run.config.training.lora is None and not comfyui
    base = find_base(run.config.generator, root, base_model, trained if whole else None)
    licence = base_licence(base, license_id)
    final, others = _finals(run, reference)
    samples = _samples(run, reference, final)
    scores = _scores(run.config, final, others)
    with atomic_folder(target) as folder:
        weights = run.folder / "weights"
        evaluated = weights / EMA if run.config.evaluation.weights == EMA else weights
        written = write_comfyui(run.config, evaluated, folder, root) if comfyui else None
        card = model_card(
            run.config,
            read_provenance(run.folder / PROVENANCE),
            scores,
            samples,
            licence,
            counts=(final["prompt_id"].nunique(), final["sample"].nunique()),
            pipeline_class=base.pipeline_class,
            hub_id=base.hub_id,
            revision=base.revision,
            loras=sorted(_handed_over(run)),
            comfyui=written,
        )
        if written is None:
            for name, place in _handed_over(run).items():
                copy_file(run.folder / "weights" / place, folder / name)
            copy_parts(base, folder)
        for name in licence.files:
            copy_file(base.folder / name, folder / name)
        for sample in samples:
            copy_file(sample.base_file, folder / sample.base)
            copy_file(sample.file, folder / sample.mine)
        _write_provenance(run, reference, scores, folder / "provenance")
        card.save(folder / "README.md")
        files = sorted(item for item in folder.rglob("*") if item.is_file())
        sums = "".join(f"{file_sha256(item)}  {item.relative_to(folder).as_posix()}\n" for item in files)
        (folder / "SHA256SUMS").write_text(sums, encoding="utf-8")
    return target


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_whole(config: Config) -> None:
    """Refuse weights that are the trained policy only on top of others than those of the base that the card names."""
    generator, lora = config.generator, config.training.lora is not None
    keys = [f"generator.{key}" for key in ("start", "file", "file_2") if getattr(generator, key) is not None]
    one = generator.experts != "both"
    if keys and (lora or one):
        held = "a LoRA" if lora else f"one transformer (generator.experts={generator.experts})"
        whole = "training.lora=null" + (" and generator.experts=both" if one else "")
        raise ExportError(
            f"{config.run_name}: {held}, trained on what {' and '.join(keys)} made of the base: with the base's own "
            f"weights it is another model than the evaluated one. Train all weights ({whole}), or write these into the "
            "folder of generator.path (diffusers: fuse_lora, save_pretrained) and train on that"
        )


def _checked(run: RunRecords, root: Path) -> RunRecords:
    """The base's evaluation to compare with, after everything that is copied or quoted was found as recorded."""
    if not run.is_trained:
        raise ExportError(f"{run.folder}: has no final weights; run vipo train with its configuration, or pull them")
    if not run.is_evaluated:
        raise ExportError(
            f"{run.evaluated}: {run.name} has no scores; run vipo evaluate with its configuration, or pull them"
        )
    if run.stale is not None:
        raise ExportError(run.stale)
    reference = _reference(run)
    made = (run.pictures.parent, run.evaluated, reference.pictures.parent, reference.evaluated)
    records = [folder / PROVENANCE for folder in (run.folder, *made)]
    if missing := [str(record) for record in records if not record.is_file()]:
        raise ExportError(
            f"{', '.join(missing)}: not here, as after a pull, which brings no records. What is handed over is checked "
            "against them and goes along with them: copy them from where the stages ran, or from the experiment's "
            "crate, or run the stages here"
        )
    problems = [problem for record in records for problem in verify_outputs(record, root)]
    training = read_provenance(records[0])
    problems += [f"{name}: changed since {run.name} was trained on it" for name in _changed_parts(training, root)]
    if problems:
        raise ExportError("not as recorded, so nothing is handed over:\n" + "\n".join(problems))
    check_finite(run.folder / "weights")
    return reference


def _changed_parts(training: Mapping[str, Any], root: Path) -> Iterator[str]:
    """Files of the base's pipeline that are not those of the training; its card and licence may have been mended."""
    for entry in training["inputs"]:
        if "model_index.json" in entry.get("files", {}):
            for name, file in entry["files"].items():
                path = root / entry["path"] / name
                part = "/" in name or name == "model_index.json"
                if part and not (path.is_file() and file_sha256(path) == file["sha256"]):
                    yield str(path)


def _reference(run: RunRecords) -> RunRecords:
    wanted = _sampling(run.config)
    places = [run.experiment.glob(f"evaluation/base-s*/{made}") for made in (PROVENANCE, "scores.parquet")]
    names = sorted({path.parent.name for place in places for path in place})
    bases = [read_run(run.experiment / "runs" / name) for name in names]
    fitting = [base for base in bases if base.stale is None and _sampling(base.config) == wanted]
    if fitting:
        return next((base for base in fitting if base.evaluation is not None), fitting[0])
    how = "with this run's generator and evaluation settings" if bases else "in this experiment"
    raise ExportError(
        f"{run.experiment / 'evaluation'}: the base was not evaluated {how}, so there is nothing to compare "
        f"{run.name} with; run vipo evaluate with arm=base and the other overrides of {run.name}"
    )


def _sampling(config: Config) -> dict[str, Any]:
    """What decides an evaluation's samples and scores beside the weights; maps are not compared."""
    identity = config.evaluation_identity()
    return {key: value for key, value in identity.items() if key not in ("kept", "perception")}


# ---- content -----------------------------------------------------------------------------------------------------


def _finals(run: RunRecords, reference: RunRecords) -> list[pd.DataFrame]:
    tables = [read_scores(own.evaluated / "scores.parquet", own.config) for own in (run, reference)]
    trained = {f"reward/{term.label}" for term in run.config.reward.terms if term.weight != 0}
    for own, table in zip((run, reference), tables, strict=True):
        if missing := sorted(trained - set(table)):
            raise ExportError(f"{own.evaluated}: {', '.join(missing)} was trained and is not measured; evaluate again")
    both, lost = on_common_samples(pd.concat([table[table["final"]] for table in tables], join="inner"))
    if missing := sorted(trained & set(lost)):
        raise ExportError(
            f"{run.evaluated}: fewer than two prompts have a score of {', '.join(missing)} here and of the base, so "
            "the card cannot tell what the training did; see why it scores so few, and evaluate again"
        )
    return [both[both["run"] == own.name] for own in (run, reference)]


def _scores(config: Config, final: pd.DataFrame, reference: pd.DataFrame) -> list[ScoreRow]:
    measured, rows = measured_columns(final), []
    trained = [f"reward/{term.label}" for term in config.reward.terms if term.weight != 0]
    for column in [*trained, *(name for name in measured if name not in trained)]:
        interval = configured_difference(final, reference, column, config.evaluation)
        better = trained_direction(column, config)
        means = (mean_score(reference, column), mean_score(final, column))
        rows.append(ScoreRow(column, *means, interval, better, left_out(final, column)))
    return rows


def _samples(run: RunRecords, reference: RunRecords, final: pd.DataFrame) -> list[CardSample]:
    """Of the first held-out prompts the first sample, as in the report."""
    first = final[final["sample"] == final["sample"].min()].head(run.config.evaluation.shown_prompts)
    found = []
    for prompt_id, text, number, update in zip(
        first["prompt_id"], first["prompt"], first["sample"], first["update"], strict=True
    ):
        name = f"{prompt_id}-{number}.png"
        files = (reference.pictures / f"u0-{name}", run.pictures / f"u{update}-{name}")
        found.append(CardSample(str(text), f"samples/base-{name}", f"samples/{name}", *files))
    return found


def _handed_over(run: RunRecords) -> dict[str, str]:
    """Files of the weights that were evaluated, for the scores are theirs: their places below ``weights/``, by name."""
    mean = run.config.evaluation.weights == EMA
    below = {place: place.removeprefix(f"{EMA}/") for place in run.weights}
    return {name: place for place, name in below.items() if (place != name) == mean}


def _write_provenance(run: RunRecords, reference: RunRecords, scores: Sequence[ScoreRow], folder: Path) -> None:
    copy_file(run.folder / PROVENANCE, folder / "train.json")
    for own, suffix in ((run, ""), (reference, "-base")):
        copy_file(own.pictures.parent / PROVENANCE, folder / f"sample{suffix}.json")
        copy_file(own.evaluated / PROVENANCE, folder / f"score{suffix}.json")
    (folder / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
    text = json.dumps([row.as_json() for row in scores], indent=1, allow_nan=False)
    (folder / "scores.json").write_text(text + "\n")
