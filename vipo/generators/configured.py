"""The configured adapter: how it is found and loaded."""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from vipo.config.generator import GeneratorConfig
from vipo.config.registries import FAMILIES
from vipo.foreign import foreign, guarded_class, resolve
from vipo.generators.applied import not_applied
from vipo.generators.base import Generator, GeneratorError
from vipo.generators.loading import without_loading_bars
from vipo.generators.tiles import check_tiles

T = TypeVar("T")


def resolve_class(config: GeneratorConfig) -> type[Generator]:
    """The adapter class of `config.family`; one that an import path names runs inside `vipo.foreign.foreign`.

    Raises:
        GeneratorError: the import path does not lead to a `Generator`.
    """
    what = f"generator.family {config.family!r}"
    if config.family in FAMILIES:
        family: type[Generator] = pkgutil.resolve_name(FAMILIES[config.family])
        return family
    found = resolve(config.family, GeneratorError, what)
    if not (isinstance(found, type) and issubclass(found, Generator)):
        raise GeneratorError(f"{what} is no subclass of vipo.generators.Generator")
    called = [name for name, value in vars(Generator).items() if name[0] != "_" and not isinstance(value, property)]
    methods = [name for name in called if callable(getattr(Generator, name))]
    return guarded_class(found, GeneratorError, what, config.family, methods)


@without_loading_bars()
def load_generator(config: GeneratorConfig, root: Path, adapter: type[Generator] | None = None) -> Generator:
    """Load the configured generator on its device.

    Args:
        config: section `generator`.
        root: repository root, for relative paths.
        adapter: that loads it; None: the configured family's.

    Raises:
        GeneratorError: the checkpoint cannot be loaded, the device is absent, or the adapter does not hold weights as
            `config.weights` says or decodes no tiles; whatever the adapter raises.
    """
    check_device(config)
    generator = (adapter or resolve_class(config)).load(config, root)
    if config.weights == "bf16" and all(value.dtype != torch.bfloat16 for value in generator.network.parameters()):
        raise GeneratorError(
            f"generator.weights bf16: family {config.family!r} holds its weights in fp32; set generator.weights=fp32"
        )
    check_tiles(generator, config)
    if missing := not_applied(generator.network, config):
        raise GeneratorError(missing)
    if config.family not in FAMILIES:
        if (timesteps := generator.timesteps) is not None:
            generator.timesteps = _guarded(lambda steps: torch.as_tensor(timesteps(steps)), config)
        if callable(shift := generator.flow_shift):
            generator.flow_shift = _guarded(lambda steps: float(shift(steps)), config)
    return generator


def held_to_sample(config: GeneratorConfig) -> GeneratorConfig:
    """Section `generator` for predictions alone: weights that autocast would round at every call are held rounded.

    No bit of a prediction depends on it (`vipo check-generator` compares), and a network takes half the memory. A
    family by import path is held as it says.
    """
    rounds = config.precision == "bf16" and config.family in FAMILIES
    return config.model_copy(update={"weights": "bf16"}) if rounds else config


def _guarded(own: Callable[[int], T], config: GeneratorConfig) -> Callable[[int], T]:
    def by_steps(steps: int) -> T:
        with foreign(GeneratorError, f"generator.family {config.family!r}", config.family):
            return own(steps)

    return by_steps


def check_device(config: GeneratorConfig) -> None:
    """Refuse a device that this machine lacks.

    Raises:
        GeneratorError: `config.device` is a CUDA device and there is none of that number.
    """
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GeneratorError(
            f"generator.device {config.device!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "set generator.device=cpu, or run where there is one"
        )
