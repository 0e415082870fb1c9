"""A generator family's stock pipeline beside ours: how it is called, what it gives, and one update in a few lines."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.config.sampling import SamplingConfig
from vipo.generators import Generator
from vipo.generators.base import resolve_class
from vipo.generators.packing import pack_latents, unpack_latents
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.rollout import Trajectory
from vipo.sampling.transitions import dance_transition, position_log_prob

PROMPTS = ["a red fox runs", 'two "owls"']


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
        family: its name in `generator.family`.
        write: makes the checkpoint in a folder.
        pipeline: the stock pipeline's class.
        parts: subfolders that hold weights; a fault in one of them is named.
        settings: section `generator`, beside family, path, size and text length.
        loading: of the stock pipeline's ``from_pretrained``.
        packed: whether the stock pipeline's latents and predictions are tokens of 2 x 2 latent pixels.
        folded: whether its predictions are such tokens, and its latents these tokens' channels over rows and columns.
        gives_levels: whether the stock pipeline tells the scheduler its levels before they are shifted.
        steps: of the compared sample.
        frames_first: whether the stock pipeline has a video's frames before its channels.
        sliced: whether the stock autoencoder decodes one sample at a time only.
        unreached: matches the parameters that have no way to the prediction, so that no gradient can reach them.
        refused: a file, keys that are set in it, and the error that names them.
        misfits: settings that do not fit this checkpoint, and the error that names them.
    """

    family: str
    write: Callable[[Path], Path]
    pipeline: Any
    parts: tuple[str, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    loading: Mapping[str, object] = field(default_factory=dict)
    packed: bool = False
    folded: bool = False
    gives_levels: bool = False
    steps: int = 3
    frames_first: bool = False
    sliced: bool = False
    unreached: str = r"\Z."
    refused: tuple[tuple[str, Mapping[str, object], str], ...] = ()
    misfits: tuple[tuple[Mapping[str, object], str], ...] = ()

    def config(self, path: Path, **changes: object) -> GeneratorConfig:
        """Of the checkpoint at `path`."""
        values = {"family": self.family, "path": str(path), "height": 32, "width": 48, "max_sequence_length": 12}
        return GeneratorConfig.model_validate(values | dict(self.settings) | changes)

    def stock(self, path: Path, **parts: object) -> Any:
        """The stock pipeline of the checkpoint at `path`, with some `parts` replaced."""
        pipeline = self.pipeline.from_pretrained(path, **self.loading, **parts)
        pipeline.set_progress_bar_config(disable=True)
        if self.sliced:
            pipeline.vae.enable_slicing()
        return pipeline

    def to_stock(self, latents: Tensor) -> Tensor:
        """Latents as the stock pipeline has them."""
        if self.frames_first:
            return latents.transpose(1, 2)
        if not (self.packed or self.folded):
            return latents
        tokens, (height, width) = pack_latents(latents), latents.shape[-2:]
        return tokens if self.packed else tokens.mT.unflatten(2, (height // 2, width // 2))

    def from_stock(self, latents: Tensor, like: Tensor) -> Tensor:
        """A prediction of the stock pipeline as ours."""
        if self.frames_first:
            return latents.transpose(1, 2)
        return unpack_latents(latents, *like.shape[-2:]) if self.packed or self.folded else latents

    def sample(self, pipeline: Any, config: GeneratorConfig, noise: Tensor) -> "Sampled":
        """What the stock pipeline makes of `noise`, and what its first scheduler step is given."""
        seen: list[tuple[Tensor, float]] = []
        step = pipeline.scheduler.step

        def record(prediction: Tensor, time: Tensor, *args: object, **options: object) -> Any:
            seen.append((prediction.clone(), float(time)))
            return step(prediction, time, *args, **options)

        pipeline.scheduler.step = record
        settings = {
            "num_frames": config.frames,
            "guidance_scale": config.guidance_scale,
            "max_sequence_length": config.max_sequence_length,
            "negative_prompt": config.negative_prompt or None,
            **resolve_class(config).stock_arguments(config),
        }
        if settings["negative_prompt"] is not None:
            settings["negative_prompt"] = [settings["negative_prompt"]] * len(PROMPTS)
        taken = inspect.signature(self.pipeline.__call__).parameters
        try:
            # Some of them write the template into the list.
            made = pipeline(
                prompt=list(PROMPTS),
                latents=self.to_stock(noise),
                height=config.height,
                width=config.width,
                num_inference_steps=self.steps,
                output_type="pt",
                **{key: value for key, value in settings.items() if key in taken and value is not None},
            )
        finally:
            pipeline.scheduler.step = step
        prediction, time = seen[0]
        pictures = made.images if config.frames is None else made.frames
        return Sampled(self.from_stock(prediction, noise), time, pictures, pipeline.scheduler)


@dataclass(frozen=True)
class Sampled:
    """What the stock pipeline did: its first prediction, the time of it, its samples, and its scheduler."""

    prediction: Tensor
    time: float
    pictures: Tensor
    scheduler: Any

    def chain(self, generator: Generator) -> Chain:
        """Our chain over the stock scheduler's levels; it ends where the stock one ends."""
        if generator.prediction == "velocity":
            levels = self.scheduler.sigmas
            return Chain(levels[:-1], levels, dance_transition, 0.3, "velocity")
        chain = training_chain(generator, len(self.scheduler.timesteps))
        assert torch.equal(chain.times, self.scheduler.timesteps.float())
        # The stock scheduler ends at the first training level; vipo's chain ends in data.
        chain.levels[-1] = self.scheduler.final_alpha_cumprod
        return chain

    def own_prediction(self, generator: Generator, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The first prediction as our generator's, and the ``(B,)`` time that ours is called with."""
        flow = generator.prediction == "velocity"
        return self.prediction, torch.full((len(noise),), self.time / 1000 if flow else self.time)


def training_chain(generator: Generator, steps: int) -> Chain:
    """A chain with noise in it."""
    ddim = generator.prediction != "velocity"
    sampling = SamplingConfig(steps=steps, shift=3.0, eta=0.5, transition="ddim" if ddim else "dance")
    return sampling_chain(sampling, generator.prediction, generator.alphas_cumprod, generator.timesteps)


def log_ratios(
    generator: Generator, conditioning: Mapping[str, Tensor], path: Trajectory, steps: Tensor, chain: Chain
) -> Tensor:
    """``logp_new - logp_old`` of the transitions ``steps[b]``, with its gradient."""
    latents, drawn, old_mean = path.at(steps)
    mean, std = chain.gaussian(latents, generator.predict(latents, chain.times[steps], conditioning), steps)
    return position_log_prob(drawn, mean, std) - position_log_prob(drawn, old_mean, std)


def loss_of(log_ratio: Tensor) -> Tensor:
    """An objective in which every position counts, and not alike."""
    weights = torch.linspace(-1, 2, log_ratio[0].numel()).reshape(log_ratio.shape[1:])
    return -(log_ratio.exp() * weights).mean()


def optimizer_of(generator: Generator) -> torch.optim.Optimizer:
    """Of what is trained, without weight decay: what has no gradient does not move."""
    trained = [value for value in generator.network.parameters() if value.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
