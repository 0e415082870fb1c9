"""Prompt sources, cleaning and splits. Imports no torch."""

from vipo.prompts.prepare import prepare_prompts, read_prompts
from vipo.prompts.prompt import Prompt, PromptError, clean_text, prompt_id

__all__ = ["Prompt", "PromptError", "clean_text", "prepare_prompts", "prompt_id", "read_prompts"]
