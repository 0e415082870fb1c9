"""What some families put around a prompt before their text encoder reads it: their stock pipelines' own templates."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import HunyuanVideo15Pipeline, QwenImage21Pipeline, QwenImagePipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input
from transformers import Qwen3VLProcessor

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError
from vipo.generators.parts import fetched, load_part
from vipo.generators.texts import as_chat
from vipo.text import cause

Template = Callable[[Any, str], str]
"""From the tokenizer and a prompt, the text that is read."""

FLUX2_DEV: Template = as_chat(lambda text: format_input([text])[0], add_generation_prompt=False)
FLUX2_KLEIN: Template = as_chat(add_generation_prompt=True, enable_thinking=False)
Z_IMAGE: Template = as_chat(add_generation_prompt=True, enable_thinking=True)


def qwen_image() -> tuple[Template, int]:
    """Qwen-Image's, and how many tokens at its start are dropped once the encoder has read them."""
    blank = QwenImagePipeline(None, None, None, None, None)
    return lambda _, text: str(blank.prompt_template_encode.format(text)), blank.prompt_template_encode_start_idx


def qwen_image_21(location: Path | str, config: GeneratorConfig) -> tuple[Any, Template, int]:
    """Qwen-Image 2.1's processor and template, and how many tokens at the start are dropped once they are read.

    Raises:
        GeneratorError: the processor is missing or damaged.
    """
    part = "processor"
    folder = fetched(location, part, config)
    processor = load_part(Qwen3VLProcessor.from_pretrained, folder, part, config, weights=False)
    try:
        blank = QwenImage21Pipeline(None, None, None, processor, None)
    except Exception as error:
        raise GeneratorError(
            f"{location}/{part}: its chat template cannot be applied ({cause(error)}); copy or download generator.path "
            "again"
        ) from error
    # It has no token for an empty prompt.
    return processor, lambda _, text: str(blank.prompt_template_t2i.format(text or " ")), blank._drop_idx


def hunyuan_video() -> tuple[Template, int]:
    """HunyuanVideo 1.5's, and how many tokens at its start are dropped once the encoder has read them."""
    defaults = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    message, dropped = defaults["system_message"].default, defaults["crop_start"].default
    return as_chat(lambda text: format_text_input([text], message)[0], add_generation_prompt=True), dropped
