"""The stages whose files all runs read: prompts and their embeddings."""

import logging
from collections.abc import Sequence
from pathlib import Path

from vipo.config.experiment import check_run
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.prompts import Prompt, check_needs, check_prompts, prepare_prompts, told_split
from vipo.provenance import ProvenanceError, record_stage, run_lock
from vipo.provenance.records import checkpoint_files
from vipo.stages.names import experiment_folder

log = logging.getLogger(__name__)


def prepare_stage(config: Config, root: Path, results: Path, wait: float = 0, readers: Sequence[Config] = ()) -> None:
    """Prompt source to ``prompts/{train,eval}.jsonl`` and ``manifest.json``; nothing where a run could not use them.

    Args:
        config: of any run.
        root, results, wait: as of every stage.
        readers: other runs that will read the prompts; what they need is checked too.
    """
    with run_lock(experiment_folder(config, results) / "prompts", wait_seconds=wait):
        _prepare(config, root, results, readers)


def _prepare(config: Config, root: Path, results: Path, readers: Sequence[Config] = ()) -> None:
    runs = [config, *readers]
    for run in runs:
        check_run(run)

    def accept(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
        for run in runs:
            check_needs(run, train, held_out)

    folder = experiment_folder(config, results) / "prompts"
    # A callable and a published set have no file; a missing file is prepare_prompts' own error.
    named = [*config.prompts.sources.values(), config.prompts.filters.blocklist]
    sources = [path for name in named if name is not None and (path := root / name).is_file()]
    tokens = None
    if config.prompts.filters.max_tokens is not None:
        from vipo.generators.tokens import token_counter

        tokens = token_counter(config.generator, root)
    with record_stage(
        "prepare",
        folder,
        inputs=sources,
        outputs=[folder / name for name in ("train.jsonl", "eval.jsonl", "manifest.json")],
        config=config.prompts_identity(),
        root=root,
        experiment=experiment_folder(config, results),
    ):
        counts = prepare_prompts(config.prompts, root, folder, accept, tokens)["counts"]
    # Before encoding and training, which take the time.
    log.info("prepare: %s", told_split(config, counts["train"], counts["eval"]))


def encode_stage(config: Config, root: Path, results: Path, wait: float = 0) -> None:
    """Prepared prompts to ``embeddings/{train,eval}.safetensors``."""
    with run_lock(experiment_folder(config, results) / "embeddings", wait_seconds=wait):
        _encode(config, root, results)


def _encode(config: Config, root: Path, results: Path) -> None:
    import torch

    from vipo.generators.encoding import encode_prompt_file
    from vipo.generators.starting import checkpoint_inputs
    from vipo.memory import free, memory_errors

    torch.set_num_threads(config.training.threads)
    experiment = experiment_folder(config, results)
    prompts, folder = experiment / "prompts", experiment / "embeddings"
    files: list[Path] = []
    remedy = "Give this stage a device with more memory, or raise cluster.encode.memory_mb"
    with (
        memory_errors("encode", remedy),
        record_stage(
            "encode",
            folder,
            inputs=[prompts / "train.jsonl", prompts / "eval.jsonl", *checkpoint_inputs(config.generator, root)],
            outputs=lambda: files,
            config=config.embeddings_identity(),
            root=root,
            experiment=experiment,
        ),
    ):
        for split in ("train", "eval"):
            source, output = prompts / f"{split}.jsonl", folder / f"{split}.safetensors"
            identity, processes = config.embeddings_identity(), config.distribution.processes
            files += encode_prompt_file(config.generator, root, source, output, identity, processes)
            # A launcher goes on beside its ranks, the first of which takes the same GPU.
            free(config.generator.device)


def make_missing(config: Config, root: Path, results: Path, wait: float) -> None:
    """Prompts and embeddings, where the results folder lacks them."""
    from vipo.training.ranks import is_rank

    for made, make in (("prompts/manifest.json", _prepare), ("embeddings/train.safetensors", _encode)):
        path = experiment_folder(config, results) / made
        if not path.is_file():
            # Of several nodes or ranks each would make it, and some would stop at the lock of another.
            if is_rank() or config.distribution.nodes > 1:
                raise ProvenanceError(
                    f"{path}: missing; run 'vipo prepare' and 'vipo encode' first, before several nodes or ranks start"
                )
            with run_lock(path.parent, wait_seconds=wait):
                # Whoever held the lock may just have made it.
                if not path.is_file():
                    make(config, root, results)


def check_shared(config: Config, root: Path, experiment: Path, split: str) -> dict[str, int]:
    """All runs read the same prompts and embeddings, so a run refuses other ones instead of replacing them.

    Returns:
        How many prompts there are in ``train`` and in ``eval``.
    """
    from vipo.generators.embeddings import check_embeddings, encoder_hashes

    prompts = experiment / "prompts"
    counts = check_prompts(prompts, config.prompts)
    check_embeddings(
        experiment / "embeddings" / f"{split}.safetensors",
        prompts / f"{split}.jsonl",
        config.embeddings_identity(),
        encoder_hashes(config.generator, root),
    )
    return counts


def check_weights(config: Config, weights: Path) -> None:
    """Refuse a folder that does not hold weights as a run's `save_network` names them, before anything is loaded.

    Raises:
        ConfigError: naming what it lacks.
    """
    from vipo.generators.configured import resolve_class
    from vipo.generators.lora import lora_file
    from vipo.generators.pipeline import PipelineGenerator

    if not weights.is_dir():
        raise ConfigError(f"--weights {weights}: no such folder; give a run's weights/, or one of its updates/")
    if not checkpoint_files(weights, (".safetensors",)):
        raise ConfigError(f"--weights {weights}: holds no safetensors; give a run's weights/, or one of its updates/")
    adapter = resolve_class(config.generator)
    # Others save under names of their own.
    if issubclass(adapter, PipelineGenerator):
        parts = [part for part in (adapter.network_folder, adapter.second_folder) if part is not None]
        if not any((weights / lora_file(part)).is_file() or (weights / part).is_dir() for part in parts):
            raise ConfigError(
                f"--weights {weights}: holds neither {lora_file(parts[0])} nor {parts[0]}/, as the weights of a run of "
                f"family {config.generator.family!r} do; give a run's weights/, or one of its updates/. A LoRA under "
                "other names is evaluated with arm=base generator.start=FILE"
            )
