"""The DAG's stages: each reads files of ``results/<experiment>`` and writes files there."""

from collections.abc import Sequence
from pathlib import Path

from vipo.config.compose import dump_config, write_if_changed
from vipo.config.models import Config, config_hash
from vipo.prompts import prepare_prompts
from vipo.provenance import ProvenanceError, read_provenance, record_stage, sign_file, write_crate, zip_crate
from vipo.provenance.lineage import PROVENANCE


def experiment_folder(config: Config, results: Path) -> Path:
    """``<results>/<experiment>``."""
    return results / config.experiment.name


def run_names(config: Config) -> list[str]:
    """All runs of the experiment, in the order of its arms and seeds."""
    return [f"{name}-s{seed}" for name, arm in config.experiment.arms.items() for seed in arm.seeds]


def prepare_stage(config: Config, root: Path, results: Path) -> None:
    """Prompt source to ``prompts/{train,eval}.jsonl`` and ``manifest.json``."""
    folder = experiment_folder(config, results) / "prompts"
    source = root / config.prompts.source
    with record_stage(
        "prepare",
        folder,
        # A callable source has no file; a missing file is prepare_prompts' own error.
        inputs=[source] if source.is_file() else [],
        outputs=[folder / name for name in ("train.jsonl", "eval.jsonl", "manifest.json")],
        config=config.prompts_identity(),
        root=root,
    ):
        prepare_prompts(config.prompts, root, folder)


def encode_stage(config: Config, root: Path, results: Path) -> None:
    """Prepared prompts to ``embeddings/{train,eval}.safetensors``."""
    import torch

    from vipo.generators.base import checkpoint_inputs
    from vipo.generators.embeddings import encode_prompt_file

    torch.set_num_threads(config.training.threads)
    experiment = experiment_folder(config, results)
    prompts, folder = experiment / "prompts", experiment / "embeddings"
    with record_stage(
        "encode",
        folder,
        inputs=[prompts / "train.jsonl", prompts / "eval.jsonl", *checkpoint_inputs(config.generator, root)],
        outputs=[folder / "train.safetensors", folder / "eval.safetensors"],
        config=config.embeddings_identity(),
        root=root,
    ):
        for split in ("train", "eval"):
            encode_prompt_file(config.generator, root, prompts / f"{split}.jsonl", folder / f"{split}.safetensors")


def train_stage(config: Config, root: Path, results: Path) -> None:
    """One run into ``runs/<arm>-s<seed>``; prompts and embeddings first where they are missing."""
    from vipo.generators.base import check_device
    from vipo.training.trainer import train_run

    check_device(config.generator)
    experiment = experiment_folder(config, results)
    if not (experiment / "prompts" / PROVENANCE).is_file():
        prepare_stage(config, root, results)
    if not (experiment / "embeddings" / PROVENANCE).is_file():
        encode_stage(config, root, results)
    _check_shared(config, experiment)
    train_run(config, root, experiment)


def evaluate_stage(config: Config, root: Path, results: Path) -> None:
    """One run's weights to ``evaluation/<arm>-s<seed>``."""
    from vipo.evaluation.evaluate import evaluate_run
    from vipo.generators.base import check_device

    check_device(config.generator)
    experiment = experiment_folder(config, results)
    _check_shared(config, experiment)
    evaluate_run(config, root, experiment)
    # The report reads it; a workflow has written the same bytes before.
    write_if_changed(experiment / "configs" / f"{config.run_name}.yaml", dump_config(config))


def _check_shared(config: Config, experiment: Path) -> None:
    # All runs read the same prompts and embeddings, so a run refuses other ones instead of replacing them.
    for name, stage, identity in (
        ("prompts", "prepare", config.prompts_identity()),
        ("embeddings", "encode", config.embeddings_identity()),
    ):
        if read_provenance(experiment / name / PROVENANCE)["config_sha256"] != config_hash(identity):
            wanted = ", ".join(f"{key}={value}" for key, value in identity.items())
            raise ProvenanceError(
                f"{experiment / name}: made with another configuration than this run's ({wanted}); "
                f"run the stage '{stage}' again with it, or choose another results folder"
            )


def report_stage(config: Config, root: Path, results: Path) -> Path:
    """All runs of the experiment to ``report/index.html``."""
    from vipo.reporting import build_report

    experiment = experiment_folder(config, results)
    runs, output = run_names(config), experiment / "report"
    read = [experiment / "prompts" / "manifest.json"]
    for run in runs:
        evaluation, training = experiment / "evaluation" / run, experiment / "runs" / run
        read += [experiment / "configs" / f"{run}.yaml"]
        read += [evaluation / name for name in ("scores.parquet", "maps.safetensors", "samples")]
        if not run.startswith("base-"):
            read += [training / name for name in ("metrics.jsonl", "timing.jsonl", "provenance.json")]
    with record_stage(
        "report",
        output,
        inputs=read,
        outputs=lambda: [
            path for path in sorted(output.rglob("*")) if path.is_file() and path.name != "provenance.json"
        ],
        config=config.experiment.model_dump(mode="json"),
        root=root,
    ):
        return build_report(experiment, runs, output)


def crate_stage(
    config: Config, root: Path, results: Path, key: Path | None = None, archive: bool = False
) -> list[Path]:
    """Everything of the experiment, described in ``ro-crate-metadata.json``, signed and zipped where asked for.

    Returns:
        The files written, the metadata first.
    """
    experiment = experiment_folder(config, results)
    written = [write_crate(experiment, root)]
    if key is not None:
        written.append(sign_file(written[0], key))
    if archive:
        written.append(zip_crate(experiment))
    return written


def study_stage(configs: Sequence[Config], results: Path, output: Path) -> Path:
    """Several experiments' results to the study's tables, figures and page; the first one's configuration decides."""
    from vipo.reporting.study import build_study

    return build_study([(experiment_folder(config, results), run_names(config)) for config in configs], output)
