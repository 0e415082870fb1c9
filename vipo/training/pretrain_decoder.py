"""The last part of a demo generator: its decoder alone, on latents that stay; resumable at any step."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.pretrain import PretrainConfig
from vipo.sampling.noise import keyed_generator
from vipo.tracking.progress import progress_bar
from vipo.training.pretrain_parts import LOG_EVERY, Family, cosine
from vipo.training.pretrain_state import keep, take_up


def finish_decoder(
    config: PretrainConfig,
    family: Family,
    vae: Any,
    images: Tensor,
    latents: Tensor,
    log: list[dict[str, Any]],
    work: Path,
    every: int,
) -> None:
    """Let the decoder go on learning in place, for `decoder_steps` steps, while the encoder stays as it is.

    What the network was trained on does not change, so this may come after it. A small object is an eighth of the
    pixels: it is still blurred when the mean error has long been small, and this part is for its edges.

    Args:
        config: how long, how large the batches and steps.
        family: whose autoencoder.
        vae: the trained autoencoder.
        images: drawn scenes ``(N, 3, ...)``, uint8.
        latents: the encoder's of all of them ``(N, C, ...)``, in the same order.
        log: rows of this part are added.
        work: where its state is kept.
        every: steps from one checkpoint to the next.

    Raises:
        StorageError: its state cannot be written.
    """
    if not config.decoder_steps:
        return
    decoding = ("decoder.", "post_quant_conv.")
    weights = {name: value for name, value in vae.named_parameters() if name.startswith(decoding)}
    optimizer = torch.optim.AdamW(weights.values(), lr=config.decoder_learning_rate, weight_decay=0.0)
    parts = {"vae": weights}
    start = take_up(work, parts, optimizer, log, "decoder's training")
    steps, batch = config.decoder_steps, config.autoencoder_batch_size
    progress = progress_bar(total=steps, done=start, description="decoder", unit="step")
    for step in range(start, steps):
        generator = keyed_generator(config.seed, "decoder", step)
        for group in optimizer.param_groups:
            group["lr"] = config.decoder_learning_rate * cosine(step, steps, warmup=50)
        index = torch.randint(len(latents), (batch,), generator=generator)
        x, clean = images[index].float() / 127.5 - 1, latents[index]
        noisy = clean + config.latent_noise * torch.randn(clean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = family.decode(vae, noisy)
        error = (decoded.float() - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        if config.autoencoder_gradient_norm is not None:
            nn.utils.clip_grad_norm_(weights.values(), config.autoencoder_gradient_norm)
        optimizer.step()
        progress.update()
        if step % LOG_EVERY == 0 or step + 1 == steps:
            log.append({"part": "decoder", "step": step, "psnr": 10 * math.log10(4.0 / float(error.detach()))})
        if (step + 1) % every == 0 or step + 1 == steps:
            keep(work, step + 1, parts, optimizer, log)
    progress.close()
