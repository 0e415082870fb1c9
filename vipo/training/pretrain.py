"""Builds a demo generator: a genuine, small `FluxPipeline` or `WanPipeline` trained on drawn scenes (`vipo base`).

Three parts, each seeded by key and each resumable: an autoencoder by reconstruction; the
transformer with its text encoders by conditional flow matching (Lipman et al., arXiv 2210.02747) with
logit-normal, shifted noise levels (Esser et al., arXiv 2403.03206) and an exponential moving average;
the decoder alone, where its recipe asks for it.
"""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from vipo.config.pretrain import PretrainConfig
from vipo.config.values import config_hash
from vipo.provenance.files import StorageError, atomic_file, check_writable
from vipo.sampling.noise import keyed_generator, keyed_seed
from vipo.tracking.progress import progress_bar
from vipo.training.pretrain_autoencoder import latents_of, trained_autoencoder
from vipo.training.pretrain_clips import Clips
from vipo.training.pretrain_decoder import finish_decoder
from vipo.training.pretrain_parts import LOG_EVERY, Family, ScenePool, build_pool, cosine, vocabulary
from vipo.training.pretrain_pictures import Pictures
from vipo.training.pretrain_state import keep, take_up

log_to = logging.getLogger(__name__)

_CHECKPOINT_EVERY = 500
_CONFIG = "training_config.json"


def _batches(
    config: PretrainConfig, latents: Tensor, pool: ScenePool, start: int
) -> Iterator[tuple[int, Tensor, list[str], Tensor, Tensor]]:
    for step in range(start, config.steps):
        generator = keyed_generator(config.seed, "flow", step)
        index = torch.randint(len(latents), (config.batch_size,), generator=generator)
        choice = torch.rand(config.batch_size, generator=generator)
        texts = [
            pool.captions[i][int(c * len(pool.captions[i]))]
            for i, c in zip(index.tolist(), choice.tolist(), strict=True)
        ]
        level = torch.sigmoid(torch.randn(config.batch_size, generator=generator))
        sigma = config.shift * level / (1 + (config.shift - 1) * level)
        noise = torch.randn((config.batch_size, *latents.shape[1:]), generator=generator)
        yield step, latents[index], texts, sigma, noise


def _check_replaceable(config: PretrainConfig, output: Path) -> None:
    """Nothing but an earlier try of the same generator makes way for it."""
    if not output.is_dir() or not any(not path.name.startswith(".") for path in output.iterdir()):
        return
    try:
        found = PretrainConfig.model_validate_json((output / _CONFIG).read_bytes())
    except (OSError, ValueError):
        found = None
    if found != config:
        held = "something else than a generator built here" if found is None else "a generator of other settings"
        raise StorageError(f"{output}: holds {held}, which would be replaced; choose another folder with --output")


def train_base(config: PretrainConfig, output: Path, work: Path) -> None:
    """Train the demo generator and write it to `output` in the diffusers layout.

    Args:
        config: what to build; every number that decides the result.
        output: folder for the pipeline, its training log and its configuration.
        work: folder for resumable state, one subfolder a configuration; a run that was killed goes on from there.

    Raises:
        StorageError: a folder cannot be written, or `output` holds something else than this generator.
    """
    _check_replaceable(config, output)
    work = work / config_hash(config.model_dump())[:12]
    for folder in (output, work):
        check_writable(folder)
    torch.set_num_threads(config.threads)
    log: list[dict[str, Any]] = []
    started = time.monotonic()
    pool = build_pool(config)
    words = vocabulary(pool)
    family: Family = Clips(config, words) if config.drawn == "motion" else Pictures(config, words)
    vae = trained_autoencoder(config, family, pool.images, log, work, _CHECKPOINT_EVERY)
    latents = latents_of(family, vae, pool.images)

    torch.manual_seed(keyed_seed(config.seed, "denoiser"))
    model: Any = family.denoiser()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    average = {name: value.detach().clone() for name, value in parameters.items()}
    parts = {"model": parameters, "average": average}
    start = take_up(work / "denoiser", parts, optimizer, log, "denoiser")

    progress = progress_bar(total=config.steps, done=start, description="flow matching", unit="step")
    smooth = 0.0
    for step, clean, texts, sigma, noise in _batches(config, latents, pool, start):
        rate = config.learning_rate * cosine(step, config.steps, warmup=config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        mixed = torch.lerp(clean, noise, sigma.view(-1, *[1] * (clean.ndim - 1)))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = family.velocity(model, mixed, sigma, texts)
        loss = F.mse_loss(velocity.float(), family.packed(noise - clean))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(config.average_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [value.detach() for value in parameters.values()], 1 - decay)
        smooth = float(loss.detach()) if step == start else 0.98 * smooth + 0.02 * float(loss.detach())
        progress.set_postfix(loss=f"{smooth:.4f}", lr=f"{rate:.1e}", refresh=False)
        progress.update()
        if (step + 1) % LOG_EVERY == 0:
            log.append(
                {
                    "part": "flow",
                    "step": step + 1,
                    "loss": float(loss.detach()),
                    "learning_rate": rate,
                }
            )
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == config.steps:
            keep(work / "denoiser", step + 1, parts, optimizer, log)
            log_to.info("flow matching: step %d of %d is saved, loss %.4f", step + 1, config.steps, smooth)
    progress.close()
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(average[name])
    finish_decoder(config, family, vae, pool.images, latents, log, work / "decoder", _CHECKPOINT_EVERY)
    # Half the bytes in the repository; every loader here computes in float32. The model's own `to` warns of every cast.
    for value in model.eval().transformer.parameters():
        value.data = value.data.to(torch.float16)
    pipeline = family.pipeline(vae, model)
    try:
        # diffusers writes it last: a folder without it is no pipeline, so nothing half-written is taken for one.
        (output / "model_index.json").unlink(missing_ok=True)
        # Tells first of all whose the files are.
        with atomic_file(output / _CONFIG) as path:
            path.write_text(json.dumps(config.model_dump(), indent=1) + "\n")
        (output / "training.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in log))
        pipeline.save_pretrained(output, safe_serialization=True)
        # diffusers derives this entry on every load and warns when it finds it in the file.
        vae_config = json.loads((output / "vae" / "config.json").read_text())
        vae_config.pop("block_out_channels", None)
        (output / "vae" / "config.json").write_text(json.dumps(vae_config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{output}: cannot be written ({error}); free disk space and start the same command again, "
            f"it goes on from {work}"
        ) from error
    log_to.info("%s: written after %.0f s in this process", output, time.monotonic() - started)
