"""The example of a model card: a few lines of diffusers that draw one sample with what was trained."""

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers

from vipo.config.run import Config
from vipo.generators.configured import resolve_class
from vipo.generators.lora import lora_file


def usage_example(
    config: Config, prompt: str, pipeline_class: str, base: str, revision: str | None, loras: Sequence[str]
) -> str:
    """Python that loads the exported folder and draws one sample with the evaluation's settings.

    Args:
        config: of the run.
        prompt: of the sample.
        pipeline_class: name in diffusers.
        base: hub id or path of the checkpoint.
        revision: of a hub id.
        loras: names of the LoRA files; of all weights none is read.
    """
    generator = config.evaluated
    adapter = resolve_class(generator)
    settings: dict[str, Any] = {
        "height": generator.height,
        "width": generator.width,
        "num_frames": generator.frames,
        "num_inference_steps": config.evaluation.steps,
        "guidance_scale": generator.guidance_scale,
        "max_sequence_length": generator.max_sequence_length,
        "negative_prompt": generator.negative_prompt or None,
        "output_type": None if generator.frames is None else "pil",
        **adapter.stock_arguments(generator),
    }
    taken = inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters
    given = "".join(f"    {key}={value!r},\n" for key, value in settings.items() if key in taken and value is not None)
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    video, part = generator.frames is not None, adapter.network_folder
    lines += ["from diffusers.utils import export_to_gif"] if video else []
    lines += ["", 'folder = "."  # where this card is: a folder, or the id on the Hub']
    if config.training.lora is None:
        lines += ["pipeline = DiffusionPipeline.from_pretrained(folder)"]
    else:
        pinned = "" if revision is None else f", revision={revision!r}"
        lines += [f"pipeline = DiffusionPipeline.from_pretrained({base!r}{pinned})"]
        loads = hasattr(getattr(diffusers, pipeline_class), "load_lora_weights")
        lines += [_lora_line(name, part, loads) for name in loras]
    if (guidance := adapter.stock_guidance(generator)) is not None:
        lines[1] += ", ClassifierFreeGuidance"
        lines += [f"pipeline.guider = ClassifierFreeGuidance(guidance_scale={guidance!r})"]
    if forced := dict(adapter.stock_forced):
        lines += [
            f"forced = {forced!r}  # in every call of the network, whatever the pipeline gives it",
            f"pipeline.{part}.register_forward_pre_hook(",
            "    lambda _, args, given: (args, given | forced), with_kwargs=True",
            ")",
        ]
    lines += [f"sample = pipeline(\n    prompt={prompt!r},\n{given}    generator=torch.Generator().manual_seed(0),"]
    if video:
        lines += [").frames[0]", f'export_to_gif(sample, "sample.gif", fps={adapter.frame_rate})']
    else:
        lines += [").images[0]", 'sample.save("sample.png")']
    return "\n".join(lines)


def _lora_line(name: str, part: str, loads: bool) -> str:
    """The call for one file: unnamed, diffusers takes any one of several, and for the first network."""
    if loads:
        second = ", load_into_transformer_2=True" if name == lora_file(f"{part}_2") else ""
        return f'pipeline.load_lora_weights(folder, weight_name="{name}"{second})'
    given = f'weight_name="{name}", prefix="{part}", use_safetensors=True'
    return f"pipeline.{part}.load_lora_adapter(folder, {given})"
