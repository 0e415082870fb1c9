"""The `sample` stage: the same held-out prompts and noise for the base and for every run's weights, ODE sampling.

One batch of samples is in memory at a time, and one network. Whoever draws a batch draws the same bytes.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vipo.config.compose import load_config_file
from vipo.config.run import Config
from vipo.config.training import EMA
from vipo.evaluation.held_out import (
    FACTS,
    EvaluationError,
    HeldOut,
    check_facts,
    check_sample,
    held_out_batches,
    sample_name,
    samples_folder,
    save_sample,
)
from vipo.evaluation.shares import Share, Work
from vipo.generators import Generator, load_generator
from vipo.generators.applied import kernel_errors
from vipo.generators.configured import held_to_sample
from vipo.generators.embeddings import load_embeddings, stack_conditioning
from vipo.generators.finite import check_finite
from vipo.generators.lora import check_adapted
from vipo.generators.starting import checkpoint_inputs
from vipo.provenance import hashed, is_made, record_stage, verify_outputs
from vipo.provenance.files import atomic_file
from vipo.provenance.parts import load_json, save_json
from vipo.provenance.records import checkpoint_files
from vipo.rewards.early import check_found
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.noise import Key, keyed_normal
from vipo.sampling.rollout import sample_ode
from vipo.tracking.progress import progress_bar

log = logging.getLogger(__name__)


def evaluation_chain(generator: Generator, config: Config) -> Chain:
    """The steps that an evaluation samples in."""
    return sampling_chain(
        config.evaluation.sampling_of(config.sampling),
        generator.prediction,
        generator.alphas_cumprod,
        generator.timesteps,
        device=config.generator.device,
        steps=config.evaluation.steps,
    )


def draw(
    generator: Generator,
    chain: Chain,
    samples: Sequence[HeldOut],
    embeddings: Mapping[str, Mapping[str, Tensor]],
    config: Config,
) -> Tensor:
    """Images ``(N, 3, H, W)`` or videos ``(N, T, 3, H, W)`` in [0, 1], on the CPU.

    Raises:
        EvaluationError: one is not finite.
        KernelError: the network cannot be called with the kernels that the configuration chose.
    """
    keys: list[Key] = [(config.evaluation.seed, "evaluation", sample.prompt.id, sample.number) for sample in samples]
    noise = keyed_normal(keys, generator.latent_shape, config.generator.device)
    conditioning = stack_conditioning(embeddings, [sample.prompt.id for sample in samples])
    with kernel_errors(config.generator):
        clean = sample_ode(generator, conditioning, chain, noise)
    images = generator.pictures(clean).cpu()
    if not bool(images.isfinite().all()):
        worst = samples[int((~images.flatten(1).isfinite().all(dim=1)).nonzero()[0])]
        raise EvaluationError(
            f"the picture of {worst.prompt.text!r}, sample {worst.number}, is not finite; the generator's weights or "
            "its precision make it so, try generator.precision=fp32"
        )
    return images


def sample_run(
    config: Config,
    root: Path,
    experiment: Path,
    share: Share | None = None,
    wait: float = 0,
    weights: Path | None = None,
) -> None:
    """Sample one run's kept updates and final weights, or the base, into ``samples/<arm>-s<seed>``.

    Writes ``pictures/u<update>-<prompt>-<number>.png`` (videos animated, lossless, every frame) and ``samples.json``:
    the configuration of the sampling, the updates, the latent grid, and of videos which frames ``[first, last + 1]``
    each latent frame stands for. What is there already, of this work, is not made again.

    Args:
        config, root: as of every stage.
        experiment: ``results/<experiment>``.
        share: of several processes that draw beside each other; it draws, and puts nothing together. None: whatever
            is missing is drawn, and all is put together.
        wait: seconds to wait for another process that draws the same share.
        weights: folder of weights that no run here made, in the place of its final ones.

    Raises:
        EvaluationError: the run is incomplete or of another configuration, no prompt is held out, or a picture is
            not finite.
    """
    prompts, embeddings = experiment / "prompts" / "eval.jsonl", experiment / "embeddings" / "eval.safetensors"
    folder, identity = samples_folder(experiment, config.run_name), config.sampling_identity()
    trained = _weights(config, experiment / "runs" / config.run_name, root, weights)
    drawn: dict[int, Path | None] = {**trained} or {0: None}
    files = [path for kept in trained.values() for path in checkpoint_files(kept, (".safetensors",))]
    inputs = hashed("sample", [prompts, embeddings, *checkpoint_inputs(config.generator, root), *files], root)
    if is_made("sample", folder, inputs, identity, root):
        log.info("%s: its samples are drawn already, in %s", config.run_name, folder)
        return
    # What cannot be scored is not worth drawing.
    for spec in config.evaluation.rewards:
        check_found(spec)
    batches = held_out_batches(prompts, config)
    work = Work(folder, identity, inputs)
    names = [f"{sample_name(update, sample)}.png" for update in drawn for batch in batches for sample in batch]
    if share is not None:
        with work.shared(share, wait):
            _draw_missing(config, root, drawn, batches, embeddings, work, share)
        return
    with record_stage(
        "sample",
        folder,
        inputs=inputs,
        outputs=[folder / FACTS, folder / "pictures"],
        config=identity,
        seeds=[config.evaluation.seed],
        root=root,
        experiment=experiment,
    ):
        with work.shared(Share(), wait):
            _draw_missing(config, root, drawn, batches, embeddings, work, Share())
        facts = load_json(work.parts / FACTS)
        work.publish(folder / "pictures", names)
        with atomic_file(folder / FACTS) as path:
            path.write_text(json.dumps({"sampling": identity, **facts}, indent=1, sort_keys=True) + "\n")
        work.discard()


def _draw_missing(
    config: Config,
    root: Path,
    weights: dict[int, Path | None],
    batches: Sequence[Sequence[HeldOut]],
    embeddings: Path,
    work: Work,
    share: Share,
) -> None:
    parts = share.of([(update, batch) for update in weights for batch in batches])
    names = {f"{sample_name(update, sample)}.png" for update, batch in parts for sample in batch}
    there = work.present([FACTS, *sorted(names)], _opened)
    wanted: dict[int, list[Sequence[HeldOut]]] = {}
    for update, batch in parts:
        if not all(f"{sample_name(update, sample)}.png" in there for sample in batch):
            wanted.setdefault(update, []).append(batch)
    # Not every share's: two that write one file are in each other's way.
    told = share.number > 1 or FACTS in there
    if told and not wanted:
        return
    generator = load_generator(held_to_sample(config.evaluated), root)
    if not told:
        save_json({"updates": list(weights), **_facts(generator)}, work.parts / FACTS)
    chain, device = evaluation_chain(generator, config), config.generator.device
    widths = generator.conditioning_widths(config.generator, root)
    prompts = {sample.prompt.id: sample.prompt for some in wanted.values() for batch in some for sample in batch}
    conditioning = load_embeddings(embeddings, list(prompts.values()), device, widths)
    total = sum(len(batch) for some in wanted.values() for batch in some)
    with progress_bar(total=total, description=f"{config.run_name}: samples", unit="sample") as progress:
        for update, some in wanted.items():
            if (folder := weights[update]) is not None:
                generator.load_network(folder)
                if config.training.lora is not None:
                    check_adapted(generator, config.training.lora.targets, folder)
            for batch in some:
                images = draw(generator, chain, batch, conditioning, config)
                for sample, image in zip(batch, images, strict=True):
                    with atomic_file(work.parts / f"{sample_name(update, sample)}.png") as path:
                        save_sample(image, path, generator.frame_rate)
                progress.update(len(batch))


def _opened(path: Path) -> None:
    if path.name == FACTS:
        check_facts(load_json(path))
    else:
        check_sample(path)


def _facts(generator: Generator) -> dict[str, Any]:
    groups = generator.frame_groups
    return {
        "grid": list(generator.grid),
        "frame_groups": None if groups is None else [[group.start, group.stop] for group in groups],
    }


def _weights(config: Config, run: Path, root: Path, given: Path | None) -> dict[int, Path]:
    if config.is_base:
        return {}
    if given is None:
        return trained_weights(config, run, root)
    check_finite(given)
    return {config.training.updates: given}


def trained_weights(config: Config, run: Path, root: Path) -> dict[int, Path]:
    """Folders of the run's kept weights by update, the final ones last.

    Raises:
        EvaluationError: the run is incomplete, damaged, or was trained with another configuration.
        GeneratorError: its weights are not finite.
    """
    kept = {number: run / "updates" / f"{number:06d}" for number in config.training.save_at}
    kept[config.training.updates] = run / "weights"
    # The final weights are what a run writes last. Its record tells whether they are as it left them; results that
    # were pulled come without it, their bytes checked by what fetched them.
    if not (run / "weights").is_dir():
        raise EvaluationError(f"{run}: no finished run; run the train stage of {config.run_name} first")
    provenance = run / "provenance.json"
    if provenance.is_file() and (damaged := verify_outputs(provenance, root)):
        raise EvaluationError(f"{run}: not as the train stage left it: {'; '.join(damaged)}; train it again")
    if load_config_file(run / "config.yaml").training_identity() != config.training_identity():
        raise EvaluationError(
            f"{run}: was trained with another configuration; train it again, or use another results folder"
        )
    if missing := [str(folder) for folder in kept.values() if not folder.is_dir()]:
        raise EvaluationError(f"{', '.join(missing)}: kept weights are missing; train {config.run_name} again")
    for folder in kept.values():
        check_finite(folder)
    return {number: folder / EMA for number, folder in kept.items()} if config.evaluation.weights == EMA else kept
