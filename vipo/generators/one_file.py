"""A network in one safetensors file, as its authors or ComfyUI name the tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError
from vipo.generators.parts import load_part, not_floating, part_without_weights, stored_dtypes
from vipo.text import cause, listed

# Which ComfyUI, and files that hold autoencoder and text encoders too, put before the network's names.
_PREFIX = "model.diffusion_model."
_REMEDY = "give a file of that network alone or of a whole pipeline, in fp32, bf16 or fp16 (generator.file)"
_NAMED = 2


def converter(kind: Any) -> Callable[..., dict[str, Tensor]] | None:
    """What diffusers makes its own names of a network's original ones by; None: it has nothing of that kind."""
    for each in kind.__mro__:
        if (known := SINGLE_FILE_LOADABLE_CLASSES.get(each.__name__)) is not None:
            found: Callable[..., dict[str, Tensor]] = known["checkpoint_mapping_fn"]
            return found
    return None


def load_network_file(kind: Any, location: Path | str, part: str, config: GeneratorConfig, file: Path) -> Any:
    """A network of one file, in fp32.

    Args:
        kind: class of the network, which `converter` knows.
        location: folder or hub id with its settings.
        part: subfolder of these.
        config: section `generator`.
        file: safetensors.

    Raises:
        GeneratorError: the file cannot be read, or a tensor of the network is missing, extra, of another shape, not
            of floating point, or not finite.
    """
    place = f"{file}: does not hold what {kind.__name__} with the settings of {location}/{part} takes"
    bare = part_without_weights(kind, location, part, config, torch.device("meta"))
    wanted = {name: tuple(value.shape) for name, value in bare.state_dict().items()}
    try:
        kinds, state = stored_dtypes([file]), load_file(file)
        own = [name for name in state if name.startswith(_PREFIX)] or list(state)
        state = {name: state[name] for name in own}
        if whole := not_floating({name: kinds[name] for name in own}):
            raise GeneratorError(f"{place}: not of floating point: {listed(whole, _NAMED)}; {_REMEDY}")
        made, left = _converted(kind, load_part(kind.load_config, location, part, config, weights=False), state, wanted)
        _check(place, wanted, made, left)
        network = kind.from_single_file(
            made,
            config=str(location),
            subfolder=part,
            config_revision=config.revision,
            torch_dtype=torch.float32,
            local_files_only=True,
        )
    except GeneratorError:
        raise
    except Exception as error:
        raise GeneratorError(f"{place} ({cause(error)}); {_REMEDY}") from error
    return network


def _converted(
    kind: Any, settings: Any, state: dict[str, Tensor], wanted: dict[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under diffusers' names, and the names of those that were left over."""
    names = list(state)
    if wanted.keys() <= state.keys():
        return state, [name for name in names if name not in wanted]
    convert = converter(kind)
    assert convert is not None
    if "unet" in kind.__name__.lower() and not names[0].startswith(_PREFIX):
        # Without it diffusers finds no network.
        state = {f"{_PREFIX}{name}": value for name, value in state.items()}
    made = convert(checkpoint=state, config=settings)
    # Most take out of the file what they use; where one does not, nothing is known of what it leaves.
    left = list(state) if len(state) < len(names) else [name for name in names if ".lora_" in name]
    return made, [*(name for name in made if name not in wanted), *left]


def _check(place: str, wanted: dict[str, tuple[int, ...]], made: dict[str, Tensor], left: list[str]) -> None:
    shapes = {name: tuple(value.shape) for name, value in made.items()}
    for fault, names in {
        "missing": [name for name in wanted if name not in made],
        "extra": left,
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in wanted.items()
            if shapes.get(name, shape) != shape
        ],
        "not finite": [name for name, value in made.items() if not bool(value.isfinite().all())],
    }.items():
        if names:
            raise GeneratorError(f"{place}: {fault}: {listed(sorted(names), _NAMED)}; {_REMEDY}")
