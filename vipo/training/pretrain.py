"""Builds a demo generator: a genuine, small `FluxPipeline` or `WanPipeline` trained on drawn scenes (`vipo base`).

Two parts, each seeded by key and each resumable: an autoencoder by reconstruction, then the
transformer with its text encoders by conditional flow matching (Lipman et al., arXiv 2210.02747) with
logit-normal, shifted noise levels (Esser et al., arXiv 2403.03206) and an exponential moving average.
"""

import functools
import json
import logging
import math
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
from vipo.training.checkpoints import (
    Checkpoint,
    check_optimizer,
    check_state,
    check_tensors,
    load_newest,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    prune_checkpoints,
    save_checkpoint,
)
from vipo.training.pretrain_clips import Clips
from vipo.training.pretrain_parts import Family, ScenePool, build_pool, vocabulary
from vipo.training.pretrain_pictures import Pictures
from vipo.training.stored import CheckpointError

log_to = logging.getLogger(__name__)

_CHECKPOINT_EVERY = 500
_CONFIG = "training_config.json"
_LOG_EVERY = 50


def train_autoencoder(config: PretrainConfig, family: Family, images: Tensor, log: list[dict[str, Any]]) -> Any:
    """Reconstruct drawn scenes; the latents' mean and scale are folded into the encoder's last convolution.

    Returns:
        An autoencoder whose latents have zero mean and unit variance per channel over `images`.
    """
    torch.manual_seed(keyed_seed(config.seed, "autoencoder"))
    vae = family.autoencoder().to(memory_format=family.memory_format)
    norm = family.norm()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.autoencoder_learning_rate, weight_decay=0.0)
    steps, batch = config.autoencoder_steps, config.autoencoder_batch_size
    progress = progress_bar(total=steps, description="autoencoder", unit="step")
    for step in range(steps):
        generator = keyed_generator(config.seed, "autoencoder", step)
        for group in optimizer.param_groups:
            group["lr"] = config.autoencoder_learning_rate * _cosine(step, steps, warmup=50)
        x = images[torch.randint(len(images), (batch,), generator=generator)].float() / 127.5 - 1
        x = x.contiguous(memory_format=family.memory_format)
        with torch.autocast("cpu", torch.bfloat16):
            latents = norm(family.encode(vae, x).float())
            # Noise makes the latent space smooth, which the transformer's own errors need.
            noisy = latents + config.latent_noise * torch.randn(latents.shape, generator=generator)
            decoded = family.decode(vae, noisy)
        error = (decoded.float() - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        progress.update()
        if step % _LOG_EVERY == 0 or step + 1 == steps:
            log.append({"part": "autoencoder", "step": step, "psnr": 10 * math.log10(4.0 / float(error.detach()))})
    progress.close()
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    last, channels = family.latent_layer(vae), config.latent_channels
    with torch.no_grad():
        raw = _latents(family, vae, images[:2048])
        around = (0, *range(2, raw.ndim))
        mean, std = raw.mean(dim=around), raw.std(dim=around)
        last.weight[:channels].div_(std.view(-1, *[1] * (last.weight.ndim - 1)))
        last.bias[:channels].sub_(mean).div_(std)
    return vae


def _latents(family: Family, vae: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([family.encode(vae, chunk.float() / 127.5 - 1) for chunk in images.split(256)])


def _cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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


def _check_autoencoder(family: Family, checkpoint: Checkpoint) -> None:
    """Refuse an autoencoder that cannot be gone on with, although its bytes are those of its manifest."""
    check_state(checkpoint, {"config": dict, "log": list})
    what = f"checkpoint {checkpoint.update} of the autoencoder"
    try:
        like = family.autoencoder_class.from_config(checkpoint.state["config"]).state_dict()
    # Whatever another configuration does to the class.
    except Exception as error:
        raise CheckpointError(f"{what}: damaged (its configuration: {type(error).__name__}: {error})") from error
    check_tensors(checkpoint.tensors, like, what)


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
    family: Family = (Clips if config.drawn == "motion" else Pictures)(config, vocabulary(pool))
    saved_vae = load_newest(work / "autoencoder", functools.partial(_check_autoencoder, family))
    if saved_vae is None:
        vae = train_autoencoder(config, family, pool.images, log)
        save_checkpoint(
            work / "autoencoder",
            config.autoencoder_steps,
            vae.state_dict(),
            {"config": {k: v for k, v in vae.config.items() if k != "block_out_channels"}, "log": log},
        )
    else:
        vae = family.autoencoder_class.from_config(saved_vae.state["config"])
        vae.load_state_dict(dict(saved_vae.tensors))
        vae.eval()
        log = saved_vae.state["log"]
    latents = _latents(family, vae, pool.images)

    torch.manual_seed(keyed_seed(config.seed, "denoiser"))
    model: Any = family.denoiser()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    average = {name: value.detach().clone() for name, value in parameters.items()}
    start = 0

    def check(checkpoint: Checkpoint) -> None:
        check_state(checkpoint, {"log": list})
        what = f"checkpoint {checkpoint.update} of the denoiser"
        for part in ("model", "average"):
            check_tensors(checkpoint.tensors.below(part), parameters, what)
        moments = checkpoint.tensors.below("optimizer")
        check_optimizer(moments, optimizer, checkpoint.state.get("optimizer_tensors"), what)

    newest = load_newest(work / "denoiser", check)
    if newest is not None:
        start, log = newest.update, newest.state["log"]
        model.load_state_dict(dict(newest.tensors.below("model")), strict=False)
        saved = newest.tensors.below("average")
        average = {name: saved[name] for name in parameters}
        load_optimizer_tensors(optimizer, newest.tensors.below("optimizer"))

    progress = progress_bar(total=config.steps, done=start, description="flow matching", unit="step")
    smooth = 0.0
    for step, clean, texts, sigma, noise in _batches(config, latents, pool, start):
        rate = config.learning_rate * _cosine(step, config.steps, warmup=config.warmup)
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
        if (step + 1) % _LOG_EVERY == 0:
            log.append(
                {
                    "part": "flow",
                    "step": step + 1,
                    "loss": float(loss.detach()),
                    "learning_rate": rate,
                }
            )
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == config.steps:
            tensors = prefixed("model", dict(parameters)) | prefixed("average", average)
            moments = optimizer_tensors(optimizer)
            tensors |= prefixed("optimizer", moments)
            state = {"log": log, "optimizer_tensors": len(moments)}
            save_checkpoint(work / "denoiser", step + 1, tensors, state)
            prune_checkpoints(work / "denoiser", step + 1, keep=2)
            log_to.info("flow matching: step %d of %d is saved, loss %.4f", step + 1, config.steps, smooth)
    progress.close()
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(average[name])
    # Half the bytes in the repository; every loader here computes in float32.
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
