"""Whether a network computes as the configuration says."""

from torch import nn

from vipo.config.generator import DEFAULT_ATTENTION, GeneratorConfig


def not_applied(network: nn.Module, config: GeneratorConfig) -> str | None:
    """Which of `config.attention` and `config.compile` a network does not compute with, and what to do; None: neither.

    It looks at the network, not at what was asked of it.
    """
    modules, of = list(network.modules()), f"the network of family {config.family!r} ({type(network).__name__})"
    chosen = {getattr(getattr(module, "processor", None), "_attention_backend", None) for module in modules}
    if config.attention not in (DEFAULT_ATTENTION, *chosen):
        return (
            f"generator.attention {config.attention!r} would change nothing: {of} does not call diffusers' attention "
            f"dispatcher; set generator.attention={DEFAULT_ATTENTION}"
        )
    if config.compile == "blocks" and all(module._compiled_call_impl is None for module in modules):
        return (
            f"generator.compile blocks would change nothing: {of} has no block of a class that diffusers repeats; set "
            "generator.compile=none"
        )
    return None
