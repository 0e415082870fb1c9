"""The first part of a demo generator: its autoencoder, by reconstruction; resumable at any step."""

import functools
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.pretrain import PretrainConfig
from vipo.sampling.noise import keyed_generator, keyed_seed
from vipo.tracking.progress import progress_bar
from vipo.training.checkpoints import Checkpoint, check_state, check_tensors, load_newest, save_checkpoint
from vipo.training.pretrain_parts import LOG_EVERY, Family, cosine
from vipo.training.pretrain_state import keep, take_up
from vipo.training.stored import CheckpointError

log_to = logging.getLogger(__name__)


def trained_autoencoder(
    config: PretrainConfig, family: Family, images: Tensor, log: list[dict[str, Any]], work: Path, every: int
) -> Any:
    """The autoencoder of an earlier try, or a new one.

    Args:
        config: what to build.
        family: whose autoencoder.
        images: drawn scenes.
        log: rows of its training are added.
        work: where its state is kept, that of steps in ``reconstruction`` and the result in ``autoencoder``.
        every: steps from one checkpoint to the next.

    Returns:
        An autoencoder whose latents have zero mean and unit variance per channel over `images`.
    """
    saved = load_newest(work / "autoencoder", functools.partial(_check_whole, family))
    if saved is not None:
        vae = family.autoencoder_class.from_config(saved.state["config"])
        vae.load_state_dict(dict(saved.tensors))
        log += saved.state["log"]
        return vae.eval()
    vae = _reconstruct(config, family, images, log, work / "reconstruction", every)
    save_checkpoint(
        work / "autoencoder",
        config.autoencoder_steps,
        vae.state_dict(),
        {"config": {k: v for k, v in vae.config.items() if k != "block_out_channels"}, "log": log},
    )
    return vae


def latents_of(family: Family, vae: Any, images: Tensor) -> Tensor:
    """Latents ``(N, C, ...)`` of drawn scenes as `ScenePool` has them."""
    with torch.no_grad():
        return torch.cat([family.encode(vae, chunk.float() / 127.5 - 1) for chunk in images.split(256)])


def _reconstruct(
    config: PretrainConfig, family: Family, images: Tensor, log: list[dict[str, Any]], work: Path, every: int
) -> Any:
    """Reconstruct drawn scenes; the latents' mean and scale are folded into the encoder's last convolution."""
    torch.manual_seed(keyed_seed(config.seed, "autoencoder"))
    vae = family.autoencoder().to(memory_format=family.memory_format)
    norm = family.norm()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.autoencoder_learning_rate, weight_decay=0.0)
    steps, batch = config.autoencoder_steps, config.autoencoder_batch_size
    parts = {"vae": vae.state_dict(), "norm": norm.state_dict()}
    start = take_up(work, parts, optimizer, log, "autoencoder's training")
    progress = progress_bar(total=steps, done=start, description="autoencoder", unit="step")
    for step in range(start, steps):
        generator = keyed_generator(config.seed, "autoencoder", step)
        stills = images.ndim == 5 and step < steps // 2
        if images.ndim == 5:
            # A batch of clips has too few scenes for statistics of its own: those of the stills stay.
            norm.train(stills)
        for group in optimizer.param_groups:
            group["lr"] = config.autoencoder_learning_rate * cosine(step, steps, warmup=50)
        x = drawn_batch(images, batch, generator, stills=stills).float() / 127.5 - 1
        x = x.contiguous(memory_format=family.memory_format)
        with torch.autocast("cpu", torch.bfloat16):
            latents = norm(family.encode(vae, x).float())
            # Noise makes the latent space smooth, which the transformer's own errors need.
            noisy = latents + config.latent_noise * torch.randn(latents.shape, generator=generator)
            decoded = family.decode(vae, noisy)
        error = (decoded.float() - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        if config.autoencoder_gradient_norm is not None:
            nn.utils.clip_grad_norm_(vae.parameters(), config.autoencoder_gradient_norm)
        optimizer.step()
        progress.update()
        if step % LOG_EVERY == 0 or step + 1 == steps:
            log.append({"part": "autoencoder", "step": step, "psnr": 10 * math.log10(4.0 / float(error.detach()))})
        if (step + 1) % every == 0 and step + 1 < steps:
            keep(work, step + 1, parts, optimizer, log)
    progress.close()
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    last, channels = family.latent_layer(vae), config.latent_channels
    with torch.no_grad():
        raw = latents_of(family, vae, images[:2048])
        around = (0, *range(2, raw.ndim))
        mean, std = raw.mean(dim=around), raw.std(dim=around)
        last.weight[:channels].div_(std.view(-1, *[1] * (last.weight.ndim - 1)))
        last.bias[:channels].sub_(mean).div_(std)
    return vae


def drawn_batch(images: Tensor, batch: int, generator: torch.Generator, *, stills: bool) -> Tensor:
    """A step's batch ``(batch, C, ...)``; `stills` of clips are ``(4 batch, C, 1, H, W)``, one frame of each.

    An autoencoder of clips learns from pictures first, as Wan's own did (arXiv 2503.20314): on clips alone
    ours stayed at the mean colour.
    """
    if not stills:
        return images[torch.randint(len(images), (batch,), generator=generator)]
    rows = torch.randint(len(images), (4 * batch,), generator=generator)
    frames = torch.randint(images.shape[2], (4 * batch,), generator=generator)
    return images[rows, :, frames].unsqueeze(2)


def _check_whole(family: Family, checkpoint: Checkpoint) -> None:
    """Refuse an autoencoder that cannot be gone on with, although its bytes are those of its manifest."""
    check_state(checkpoint, {"config": dict, "log": list})
    what = f"checkpoint {checkpoint.update} of the autoencoder"
    try:
        like = family.autoencoder_class.from_config(checkpoint.state["config"]).state_dict()
    # Whatever another configuration does to the class.
    except Exception as error:
        raise CheckpointError(f"{what}: damaged (its configuration: {type(error).__name__}: {error})") from error
    check_tensors(checkpoint.tensors, like, what)
