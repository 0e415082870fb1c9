"""The stock pipeline of a checkpoint: how it is loaded and called, and what it makes of given noise."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.config.sampling import SamplingConfig
from vipo.foreign import foreign
from vipo.generators.base import Generator, GeneratorError, checkpoint_location
from vipo.generators.loading import without_loading_bars
from vipo.generators.lora import lora_file
from vipo.generators.parts import load_part, model_index, variant_of
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.schedules import flow_settings
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.transitions import dance_transition


@dataclass(frozen=True)
class Sampled:
    """What the stock pipeline did.

    Attributes:
        prediction: its first one, ``(B, *latent_shape)``, as our generator has them.
        time: of that prediction, as its scheduler counts.
        pictures: ``(B, *sample_shape)`` in [0, 1].
        scheduler: with the levels that it went through.
    """

    prediction: Tensor
    time: float
    pictures: Tensor
    scheduler: Any

    def chain(self, generator: Generator) -> Chain:
        """Our chain over the stock scheduler's levels; it ends where the stock one ends.

        Raises:
            GeneratorError: the adapter names other timesteps.
        """
        device = generator.device
        if generator.prediction == "velocity":
            levels = self.scheduler.sigmas.to(device)
            return Chain(levels[:-1], levels, dance_transition, 0.3, "velocity")
        chain = training_chain(generator, len(self.scheduler.timesteps))
        if not torch.equal(chain.times.cpu(), self.scheduler.timesteps.float().cpu()):
            raise GeneratorError(
                f"generator.family {generator.config.family!r}: its timesteps {chain.times.tolist()} are not the stock "
                f"scheduler's {self.scheduler.timesteps.tolist()}"
            )
        # The stock scheduler ends at the first training level; vipo's chain ends in data.
        chain.levels[-1] = self.scheduler.final_alpha_cumprod
        return chain

    def times(self, generator: Generator) -> Tensor:
        """The ``(B,)`` time of `prediction` as our generator is called with it."""
        flow = generator.prediction == "velocity"
        rows = len(self.prediction)
        return torch.full((rows,), self.time / 1000 if flow else self.time, device=generator.device)


def training_chain(generator: Generator, steps: int) -> Chain:
    """A chain with noise in it."""
    ddim = generator.prediction != "velocity"
    sampling = SamplingConfig(steps=steps, shift=3.0, eta=0.5, transition="ddim" if ddim else "dance")
    schedule = (generator.prediction, generator.alphas_cumprod, generator.timesteps)
    return sampling_chain(sampling, *schedule, device=generator.device)


def stock_pipeline(kind: type[PipelineGenerator], config: GeneratorConfig, root: Path, **parts: object) -> Any:
    """The stock pipeline with the deterministic scheduler of its family: flow-match Euler, or DDIM.

    Args:
        kind: the adapter.
        config: section `generator`.
        root: repository root, for relative paths.
        parts: that replace the checkpoint's.

    Raises:
        GeneratorError: it cannot be loaded.
    """
    location = checkpoint_location(config, root)
    index = model_index(location, config.revision)
    # Parts that the checkpoint does not have are asked for all the same.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    variant = variant_of(location, kind.network_folder)
    options = {"revision": config.revision, "torch_dtype": torch.float32, "use_safetensors": True}
    with foreign(GeneratorError, f"the stock pipeline {kind.pipeline_class.__name__}", "diffusers"):
        with without_loading_bars():
            pipeline = kind.pipeline_class.from_pretrained(
                location, **options, **({} if variant is None else {"variant": variant}), **absent | parts
            )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(config.device)
        # The mask of HunyuanVideo 1.5's attention fits one video alone, and a slice of what takes noise levels is given
        # the next one's latents for its level (diffusers 0.42).
        sliced = hasattr(pipeline.vae, "enable_slicing") and not pipeline.vae.config.get("timestep_conditioning")
        if sliced:
            pipeline.vae.enable_slicing()
        if config.decoding == "tiled":
            pipeline.vae.enable_tiling()
    if forced := dict(kind.stock_forced):
        getattr(pipeline, kind.network_folder).register_forward_pre_hook(
            lambda _, args, given: (args, given | forced), with_kwargs=True
        )
    if (guidance := kind.stock_guidance(config)) is not None:
        pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance)
    pipeline.scheduler = deterministic_scheduler(kind, location, config)
    return pipeline


def deterministic_scheduler(kind: type[PipelineGenerator], location: Path | str, config: GeneratorConfig) -> Any:
    """Flow-match Euler with the checkpoint's shifts, or the family's DDIM with its betas and timesteps.

    Raises:
        GeneratorError: the checkpoint's scheduler is missing, or has a setting that the chain does not hold.
    """
    if kind.prediction != "velocity":
        ddim = load_part(kind.ddim.from_pretrained, location, "scheduler", config, weights=False)
        # vipo's chain clips nothing.
        return type(ddim).from_config(ddim.config, clip_sample=False)
    settings = flow_settings(location, config)
    if str(settings.get("_class_name")).startswith("FlowMatch"):
        return FlowMatchEulerDiscreteScheduler.from_config(settings)
    return FlowMatchEulerDiscreteScheduler(shift=float(settings.get("flow_shift", settings.get("shift", 1.0))))


def sample_stock(
    pipeline: Any,
    kind: type[PipelineGenerator],
    config: GeneratorConfig,
    prompts: Sequence[str],
    noise: Tensor,
    steps: int,
) -> Sampled:
    """What the stock pipeline makes of `noise`, and what its first scheduler step is given.

    Of a family whose stock pipeline draws a prompt otherwise beside others, each is drawn alone.

    Args:
        pipeline: as `stock_pipeline` gives it.
        kind: the adapter.
        config: section `generator`.
        prompts: one a row of `noise`.
        noise: ``(B, *latent_shape)`` float32.
        steps: T of the sample.

    Raises:
        GeneratorError: it raised.
    """
    if not kind.stock_joins_prompts and len(prompts) > 1:
        drawn = [
            sample_stock(pipeline, kind, config, [prompt], noise[row : row + 1], steps)
            for row, prompt in enumerate(prompts)
        ]
        predictions, pictures = (torch.cat([getattr(one, key) for one in drawn]) for key in ("prediction", "pictures"))
        return Sampled(predictions, drawn[0].time, pictures, pipeline.scheduler)
    seen: list[tuple[Tensor, float]] = []

    def record(scheduler: Any, prediction: Tensor, time: Any, *args: object, **options: object) -> Any:
        seen.append((prediction.clone(), float(time)))
        return type(scheduler).step(scheduler, prediction, time, *args, **options)

    # A method, so that a copy of the scheduler that the pipeline makes (LTX-2) steps by itself.
    pipeline.scheduler.step = MethodType(record, pipeline.scheduler)
    settings = {
        "num_frames": config.frames,
        "guidance_scale": config.guidance_scale,
        "max_sequence_length": config.max_sequence_length,
        "negative_prompt": config.negative_prompt or None,
        **kind.stock_arguments(config),
    }
    if settings["negative_prompt"] is not None:
        settings["negative_prompt"] = [settings["negative_prompt"]] * len(prompts)
    taken = inspect.signature(pipeline.__call__).parameters
    try:
        with foreign(GeneratorError, f"the stock pipeline {kind.pipeline_class.__name__}", "diffusers"):
            # Some of them write the template into the list.
            made = pipeline(
                prompt=list(prompts),
                latents=kind.to_stock(noise),
                height=config.height,
                width=config.width,
                num_inference_steps=steps,
                output_type="pt",
                **{key: value for key, value in settings.items() if key in taken and value is not None},
            )
    finally:
        del pipeline.scheduler.step
    prediction, time = seen[0]
    pictures = kind.opaque(made.images) if config.frames is None else made.frames
    return Sampled(kind.from_stock(prediction, noise.shape), time, pictures, pipeline.scheduler)


def load_trained(kind: type[PipelineGenerator], stock: Callable[..., Any], folder: Path) -> Any:
    """The stock pipeline with what `save_network` wrote, loaded as its users would.

    Args:
        kind: the adapter.
        stock: makes the pipeline, with parts that replace the checkpoint's.
        folder: of `save_network`.

    Raises:
        GeneratorError: the pipeline refuses it.
    """
    parts = [part for part in (kind.network_folder, kind.second_folder) if part is not None]
    whole = {
        part: kind.network_class.from_pretrained(folder, subfolder=part) for part in parts if (folder / part).is_dir()
    }
    pipeline = stock(**whole)
    for part in parts:
        if not (folder / lora_file(part)).is_file():
            continue
        # Of a second network, the stock pipeline is told which.
        second = {} if part == kind.network_folder else {f"load_into_{part}": True}
        with foreign(GeneratorError, f"the stock pipeline {kind.pipeline_class.__name__}", "diffusers"):
            if hasattr(pipeline, "load_lora_weights"):
                pipeline.load_lora_weights(folder, weight_name=lora_file(part), **second)
            else:
                getattr(pipeline, part).load_lora_adapter(folder, prefix=part, use_safetensors=True)
    return pipeline
