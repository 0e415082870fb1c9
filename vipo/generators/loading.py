"""The libraries' own bars while weights are loaded: they tell nothing of how a stage goes, and fill its log."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """The block or the decorated function without loading bars of transformers and diffusers; downloads show theirs."""
    # Only what loads weights needs these, and does import them.
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (transformers_logging, diffusers_logging) if library.is_progress_bar_enabled()]
    downloads = not are_progress_bars_disabled()
    for library in shown:
        library.disable_progress_bar()
    # transformers takes the hub's along.
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
