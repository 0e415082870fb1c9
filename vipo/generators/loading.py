"""What the libraries say while weights are loaded.

Their bars tell nothing of how a stage goes, and fill its log. Their warnings quote what a checkpoint's files hold.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """The block or the decorated function without loading bars of transformers and diffusers; downloads show theirs.

    Their warnings are records of vipo's log from then on, whose text is safe to print.
    """
    # Only what loads weights needs these, and does import them.
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (transformers_logging, diffusers_logging):
        library.disable_default_handler()
        library.enable_propagation()
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
