"""Prompt sources, cleaning and splits. Imports no torch."""

from vipo.prompts.needs import check_needs, told_split
from vipo.prompts.prepare import check_prompts, prepare_prompts, read_prompts, split_prompts
from vipo.prompts.prompt import Prompt, PromptError, categories_of, clean_text, prompt_id

__all__ = [
    "Prompt",
    "PromptError",
    "categories_of",
    "check_needs",
    "check_prompts",
    "clean_text",
    "prepare_prompts",
    "prompt_id",
    "read_prompts",
    "split_prompts",
    "told_split",
]
