"""The `evaluate` stage: the same held-out prompts and noise for every arm, ODE sampling, all rewards.

The base generator is sampled again beside every arm, so that the change of each sample against the base is known
without reading another stage's pictures.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vipo.config.compose import dump_config, load_config_file
from vipo.config.run import Config
from vipo.demo.scenes import foreground
from vipo.determinism import deterministic_algorithms
from vipo.errors import VipoError
from vipo.evaluation.summary import summarize
from vipo.generators import Generator, load_generator
from vipo.generators.base import checkpoint_inputs
from vipo.generators.embeddings import load_embeddings, stack_conditioning
from vipo.generators.finite import check_finite
from vipo.generators.lora import check_adapted
from vipo.perception import PerceptualStructuring, load_backbone
from vipo.prompts import Prompt, read_prompts
from vipo.provenance import record_stage, verify_outputs
from vipo.provenance.files import atomic_file, atomic_folder
from vipo.provenance.lineage import PROVENANCE, read_provenance
from vipo.rewards import Reward, check_identities, identities, in_use, load_rewards, score, weight_files
from vipo.sampling.chain import sampling_chain
from vipo.sampling.noise import Key, keyed_normal
from vipo.sampling.rollout import sample_ode
from vipo.tracking.progress import progress_bar

log = logging.getLogger(__name__)


class EvaluationError(VipoError):
    """Evaluation cannot start; the message names the missing input."""


@dataclass(frozen=True)
class HeldOut:
    """One sample that every arm draws: a prompt and a sample number, which key its noise."""

    prompt: Prompt
    number: int

    @property
    def name(self) -> str:
        """File-safe name within an update: prompt ids are hexadecimal."""
        return f"{self.prompt.id}-{self.number}"


def held_out_samples(prompts: Sequence[Prompt], config: Config) -> list[HeldOut]:
    """The samples of the evaluation, prompt by prompt, the same for every arm and seed."""
    chosen = sorted(prompts, key=lambda prompt: prompt.id)[: config.evaluation.prompts]
    return [HeldOut(prompt, number) for prompt in chosen for number in range(config.evaluation.samples_per_prompt)]


def sample_held_out(
    generator: Generator,
    samples: Sequence[HeldOut],
    embeddings: dict[str, dict[str, Tensor]],
    config: Config,
    progress: "tqdm[Any] | None" = None,
) -> Tensor:
    """Images ``(N, 3, H, W)`` or videos ``(N, T, 3, H, W)`` in [0, 1], quantised to 8 bits as they are stored.

    `progress` is a bar over samples.
    """
    device = config.generator.device
    chain = sampling_chain(
        config.sampling,
        generator.prediction,
        generator.alphas_cumprod,
        generator.timesteps,
        device=device,
        steps=config.evaluation.steps,
    )
    images = []
    for start in range(0, len(samples), config.evaluation.batch):
        chunk = samples[start : start + config.evaluation.batch]
        keys: list[Key] = [(config.evaluation.seed, "evaluation", sample.prompt.id, sample.number) for sample in chunk]
        noise = keyed_normal(keys, generator.latent_shape, device)
        conditioning = stack_conditioning(embeddings, [sample.prompt.id for sample in chunk])
        images.append(generator.pictures(sample_ode(generator, conditioning, chain, noise)).cpu())
        if progress is not None:
            progress.update(len(chunk))
    return (torch.cat(images) * 255).round() / 255


def evaluate_run(config: Config, root: Path, experiment: Path) -> None:
    """Evaluate one run's kept updates and final weights into ``evaluation/<arm>-s<seed>``.

    Writes ``config.yaml`` (resolved, complete), ``scores.parquet`` (one row per update and sample),
    ``summary.json``, ``samples/*.png`` (videos animated, lossless, every frame) and ``maps.safetensors``: allocation
    maps of the final samples, ``(h, w)`` or ``(T_lat, h, w)``. A video's file says in its metadata `frame_groups`
    which frames ``[first, last + 1]`` each latent frame stands for (JSON).

    Raises:
        EvaluationError: the run is incomplete or of another configuration, no prompt is held out, or a reward
            is not finite.
    """
    torch.set_num_threads(config.training.threads)
    deterministic_algorithms()
    output = experiment / "evaluation" / config.run_name
    prompts_path, embeddings_path = (
        experiment / "prompts" / "eval.jsonl",
        experiment / "embeddings" / "eval.safetensors",
    )
    weights = {} if config.is_base else trained_weights(config, experiment / "runs" / config.run_name, root)
    structuring = PerceptualStructuring(
        load_backbone(config.perception, config.generator.device, root), config.perception
    )
    inputs = [prompts_path, embeddings_path, *checkpoint_inputs(config.generator, root)]
    if structuring.backbone.source is not None:
        inputs.append(structuring.backbone.source)
    rewards = load_rewards(config.evaluation.rewards, config.generator.device)
    inputs += [path for reward in rewards.values() for path in weight_files(reward)]
    inputs += [path for folder in weights.values() for path in sorted(folder.rglob("*.safetensors"))]
    processes = identities(rewards)
    if not config.is_base and processes:
        record = experiment / "runs" / config.run_name / PROVENANCE
        trained = read_provenance(record).get("reward_processes", {}) if record.is_file() else {}
        check_identities(trained, processes, record)
    files = [output / name for name in ("config.yaml", "scores.parquet", "summary.json", "maps.safetensors")]
    with record_stage(
        "evaluate",
        output,
        inputs=inputs,
        outputs=lambda: [*files, *sorted((output / "samples").iterdir())],
        config=config.evaluation_identity(),
        seeds=[config.seed, config.evaluation.seed],
        root=root,
        experiment=experiment,
    ) as facts:
        if processes:
            facts["reward_processes"] = processes
        samples = held_out_samples(read_prompts(prompts_path), config)
        if not samples:
            raise EvaluationError(f"{prompts_path}: no prompt is held out; raise prompts.eval_share")
        prompts = list({sample.prompt.id: sample.prompt for sample in samples}.values())
        generator = load_generator(config.generator, root)
        embeddings = load_embeddings(
            embeddings_path, prompts, config.generator.device, generator.conditioning_widths(config.generator, root)
        )
        structuring.preflight((config.generator.height, config.generator.width))
        blank = torch.zeros(1, *config.generator.sample_shape, device=config.generator.device)
        for name, reward in rewards.items():
            score(name, reward, blank, [prompts[0].text], [prompts[0].metadata])
        total = len(samples) * (1 + len(weights))
        with progress_bar(total=total, description=f"{config.run_name}: samples", unit="sample") as progress:
            base = sample_held_out(generator, samples, embeddings, config, progress)
            pictures = {0: base} if config.is_base else {}
            for number, folder in weights.items():
                generator.load_network(folder)
                if config.training.lora is not None:
                    check_adapted(generator.network, config.training.lora.targets, folder)
                pictures[number] = sample_held_out(generator, samples, embeddings, config, progress)
        log.info("%s: scoring %d samples of updates %s", config.run_name, len(samples), ", ".join(map(str, pictures)))
        scores = score_pictures(pictures, base, samples, rewards, config)
        final = max(pictures)
        size, groups, device = generator.grid, generator.frame_groups, config.generator.device
        found = [structuring(part.to(device), size, groups) for part in pictures[final].split(config.evaluation.batch)]
        for part in found:
            part.check()
        maps = torch.cat([part.maps for part in found])
        with atomic_folder(output / "samples") as folder:
            for number, images in pictures.items():
                for sample, image in zip(samples, images, strict=True):
                    save_sample(image, folder / f"u{number}-{sample.name}.png", generator.frame_rate)
        with atomic_file(output / "maps.safetensors") as path:
            heats = {f"u{final}-{s.name}": heat.cpu().clone() for s, heat in zip(samples, maps, strict=True)}
            spans = None if groups is None else {"frame_groups": json.dumps([[g.start, g.stop] for g in groups])}
            save_file(heats, path, spans)
        with atomic_file(output / "config.yaml") as path:
            path.write_text(dump_config(config), encoding="utf-8")
        with atomic_file(output / "scores.parquet") as path:
            scores.to_parquet(path, index=False)
        with atomic_file(output / "summary.json") as path:
            path.write_text(json.dumps(summarize(scores), indent=1, sort_keys=True) + "\n")


def save_sample(image: Tensor, path: Path, frame_rate: int | None = None) -> None:
    """Write a picture ``(3, H, W)`` as PNG, or a video ``(T, 3, H, W)`` as animated PNG with every frame.

    Args:
        image: in [0, 1], multiples of 1/255: the file is lossless.
        path: of the file, whatever its suffix.
        frame_rate: of a video, frames per second.
    """
    pixels = (image * 255).round().to(torch.uint8).movedim(-3, -1).numpy()
    if image.ndim == 3:
        Image.fromarray(pixels).save(path, format="PNG")
        return
    first, *others = (Image.fromarray(frame) for frame in pixels)
    # Pillow merges equal neighbours of equal blending into one long frame. Over and source are the same without
    # transparency, so that alternating them keeps every frame.
    blend = [number % 2 for number in range(len(pixels))]
    duration = 1000 / (frame_rate or 1)
    first.save(
        path, format="PNG", save_all=True, append_images=others, duration=[duration] * len(pixels), blend=blend, loop=0
    )


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
    return kept


def score_pictures(
    pictures: dict[int, Tensor],
    base: Tensor,
    samples: Sequence[HeldOut],
    rewards: Mapping[str, Reward],
    config: Config,
) -> pd.DataFrame:
    """One row per update and sample: identifiers, every reward, and the change against the base.

    Raises:
        EvaluationError: a picture or a reward is not finite.
    """
    texts, metadata = [s.prompt.text for s in samples], [s.prompt.metadata for s in samples]
    scene = base.ndim == 4 and all("objects" in row for row in metadata)
    tables = []
    for number, images in pictures.items():
        if not bool(images.isfinite().all()):
            worst = samples[int((~images.flatten(1).isfinite().all(dim=1)).nonzero()[0])]
            raise EvaluationError(
                f"update {number}: the picture of {worst.prompt.text!r}, sample {worst.number}, is not finite; the "
                "generator's weights or its precision make it so, try generator.precision=fp32"
            )
        columns: dict[str, Any] = {
            "run": config.run_name,
            "arm": config.arm,
            "seed": config.seed,
            "update": number,
            "final": number == max(pictures),
            "prompt_id": [s.prompt.id for s in samples],
            "prompt": texts,
            "sample": [s.number for s in samples],
        }
        for name, reward in rewards.items():
            batch, device = config.evaluation.batch, config.generator.device
            with in_use(reward):
                values = torch.cat(
                    [
                        score(name, reward, part.to(device), texts[i * batch :][:batch], metadata[i * batch :][:batch])
                        for i, part in enumerate(images.split(batch))
                    ]
                )
            if not bool(values.isfinite().all()):
                worst = samples[int((~values.isfinite()).nonzero()[0])]
                raise EvaluationError(
                    f"reward {name!r} is not finite for {worst.prompt.text!r}, sample {worst.number}, update {number}; "
                    "mend it, or leave it out of evaluation.rewards"
                )
            columns[f"reward/{name}"] = values.double().numpy()
        columns |= {name: values.double().numpy() for name, values in image_change(images, base, scene).items()}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


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
