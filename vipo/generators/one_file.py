"""A network in one safetensors file, as its authors or ComfyUI name the tensors."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError
from vipo.generators.original import original_state, state_of_original
from vipo.generators.original_names import NAMES, UNUSED, Rules
from vipo.generators.parts import not_floating, part_without_weights, stored_dtypes
from vipo.text import cause, listed

log = logging.getLogger(__name__)

# Which ComfyUI, and files that hold autoencoder and text encoders too, put before the network's names.
_PREFIX = "model.diffusion_model."
_REMEDY = "give a file of that network alone or of a whole pipeline, in fp32, bf16 or fp16 (generator.file)"
_NAMED = 2

Converter = Callable[..., dict[str, Tensor]]


def readable(kind: Any) -> bool:
    """Whether the original names of a network of class `kind` are known."""
    return _rules(kind) is not None or _converter(kind) is not None


def _rules(kind: Any) -> Rules | None:
    found: Rules | None = _of(kind, NAMES)
    return found


def _converter(kind: Any) -> Converter | None:
    """What diffusers makes its own names of a network's original ones by; None: it has nothing of that kind."""
    known = _of(kind, SINGLE_FILE_LOADABLE_CLASSES)
    return None if known is None else known["checkpoint_mapping_fn"]


def _of(kind: Any, known: Mapping[str, Any]) -> Any:
    """What is known of a class or the nearest one that it is made of; None: nothing."""
    return next((known[each.__name__] for each in kind.__mro__ if each.__name__ in known), None)


def load_network_file(kind: Any, location: Path | str, part: str, config: GeneratorConfig, file: Path) -> Any:
    """A network of one file, in fp32.

    Args:
        kind: class of the network, which is `readable`.
        location: folder or hub id with its settings.
        part: subfolder of these.
        config: section `generator`.
        file: safetensors.

    Raises:
        GeneratorError: the file cannot be read, or a tensor of the network is missing, extra, of another shape, not
            of floating point, or not finite.
    """
    place = f"{file}: does not hold what {kind.__name__} with the settings of {location}/{part} takes"
    network = part_without_weights(kind, location, part, config, init_empty_weights(include_buffers=False))
    try:
        kinds, state = stored_dtypes([file]), load_file(file)
        own = [name for name in state if name.startswith(_PREFIX)] or list(state)
        if whole := not_floating({name: kinds[name] for name in own}):
            raise GeneratorError(f"{place}: not of floating point: {listed(whole, _NAMED)}; {_REMEDY}")
        made = _converted(file, place, network, {name.removeprefix(_PREFIX): state[name] for name in own})
        network.load_state_dict({name: value.float() for name, value in made.items()}, assign=True)
    except GeneratorError:
        raise
    except Exception as error:
        raise GeneratorError(f"{place} ({cause(error)}); {_REMEDY}") from error
    return network.eval()


def _converted(file: Path, place: str, network: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's own tensors under diffusers' names."""
    with torch.device("meta"):
        wanted = {name: torch.empty(value.shape) for name, value in network.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    if shapes.keys() <= state.keys():
        _check(place, shapes, state, [name for name in state if name not in shapes])
        return state
    if (rules := _rules(type(network))) is not None:
        named = rules(network.config)
        original = {name: tuple(value.shape) for name, value in original_state(wanted, named).items()}
        unused: tuple[str, ...] = _of(type(network), UNUSED) or ()
        beside = tuple(name for name in unused if name.endswith("."))
        used = {name: value for name, value in state.items() if name in original}
        left = [name for name in state if name not in {*used, *unused} and not name.startswith(beside)]
        _check(place, original, used, left)
        if parts := sorted({name.partition(".")[0] for name in state if name.startswith(beside)}):
            log.warning("%s: %s of it are not read: those of the folder are", file, ", ".join(parts))
        return state_of_original(state, shapes, named)
    convert, names = _converter(type(network)), list(state)
    assert convert is not None
    made = convert(checkpoint=state, config=network.config)
    # Most take out of the file what they use; where one does not, nothing is known of what it leaves.
    left = list(state) if len(state) < len(names) else [name for name in names if ".lora_" in name]
    _check(place, shapes, made, [*(name for name in made if name not in shapes), *left])
    return made


def _check(place: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], left: Sequence[str]) -> None:
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    for fault, names in {
        "missing": [name for name in wanted if name not in found],
        "extra": left,
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in wanted.items()
            if shapes.get(name, shape) != shape
        ],
        "not finite": [name for name, value in found.items() if not bool(value.isfinite().all())],
    }.items():
        if names:
            raise GeneratorError(f"{place}: {fault}: {listed(sorted(names), _NAMED)}; {_REMEDY}")
