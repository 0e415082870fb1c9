"""How many tokens a generator's own tokenizers make of a text."""

from collections.abc import Callable
from pathlib import Path

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError, checkpoint_location
from vipo.generators.configured import resolve_class
from vipo.generators.parts import fetched


def token_counter(config: GeneratorConfig, root: Path) -> Callable[[str], int]:
    """A function that counts a text's tokens, special ones included: most of any tokenizer that reads whole prompts.

    Raises:
        GeneratorError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    location = checkpoint_location(config, root)
    named = resolve_class(config).prompt_tokenizers
    names = ("tokenizer*",) if named is None else named
    try:
        found = (path for name in names for path in fetched(location, name, config).glob(name))
        folders = sorted(path for path in found if path.is_dir())
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    except (OSError, ValueError) as error:
        raise GeneratorError(f"{config.path}: its tokenizers cannot be loaded ({error})") from error
    if not tokenizers:
        raise GeneratorError(
            f"{config.path}: has no tokenizer, so prompts.filters.max_tokens counts nothing; leave it out"
        )
    return lambda text: max(len(tokenizer(text).input_ids) for tokenizer in tokenizers)
