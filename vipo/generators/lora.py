"""LoRA weights: what a target names, and what a file must hold."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vipo.generators.base import Generator, GeneratorError
from vipo.generators.experts import Experts
from vipo.generators.parts import not_floating, stored_dtypes

LORA_FILE = "pytorch_lora_weights.safetensors"

_SECOND_LORA_FILE = "pytorch_lora_weights_2.safetensors"

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight\Z")


def lora_file(part: str) -> str:
    """Name of the LoRA file of a network, by its subfolder; of a second network it is another one."""
    return _SECOND_LORA_FILE if part.endswith("_2") else LORA_FILE


def check_targets(network: Any, targets: Sequence[str], untrained: str) -> None:
    """Refuse a target that names no module; peft goes on as soon as another one does.

    Args:
        network: without an adapter.
        targets: of the training.
        untrained: as `vipo.generators.base.Generator` has it.

    Raises:
        GeneratorError: naming it.
    """
    names = [name for name, _ in network.named_modules() if name and not re.fullmatch(untrained, name)]
    for target in targets:
        if not any(_names(target, name) for name in names):
            ends = sorted({".".join(name.split(".")[-(target.count(".") + 1) :]) for name in names})
            close = difflib.get_close_matches(target, ends, n=3)
            raise GeneratorError(
                f"training.lora.targets {[target]}: matches no module of {type(network).__name__}"
                + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
            )


def check_adapted(generator: Generator, targets: Sequence[str], folder: Path) -> None:
    """Refuse trained LoRA weights without a module that training adapted: the file alone does not tell.

    Args:
        generator: with the weights loaded; a network without peft's layers is not looked at.
        targets: of the training.
        folder: where the weights are, for the message.

    Raises:
        GeneratorError: naming the first such module.
    """
    network: Any = generator.network
    if not getattr(network, "peft_config", None):
        return
    trained = [getattr(network, name) for name in network.trained] if isinstance(network, Experts) else [network]
    for name, module in (named for part in trained for named in part.named_modules()):
        meant = any(_names(target, name) for target in targets) and not re.fullmatch(generator.untrained, name)
        if meant and not hasattr(module, "lora_A"):
            raise _fault(folder, "missing", f"{name}.lora_A.weight and {name}.lora_B.weight")


def _names(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def check_file(file: Path, network: Any, prefix: str) -> None:
    """Refuse a LoRA file with a tensor that is missing, extra, of another shape or not of floating point.

    Args:
        file: as `save_network` wrote it.
        network: without an adapter.
        prefix: which the names of the file's tensors begin with, the network's subfolder.

    Raises:
        GeneratorError: naming file and tensor.
    """
    with safe_open(file, framework="pt") as stream:
        shapes = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    modules, sides = dict(network.named_modules()), dict[str, dict[str, tuple[int, ...]]]()
    for name, shape in shapes.items():
        match = _TENSOR.match(name.removeprefix(f"{prefix}."))
        if not name.startswith(f"{prefix}.") or match is None or not hasattr(modules.get(match["module"]), "weight"):
            raise _fault(file, "extra", name)
        sides.setdefault(match["module"], {})[match["side"]] = shape
    if not sides:
        raise _fault(file, "missing", "every one")
    if whole := not_floating(stored_dtypes([file])):
        raise _fault(file, "not of floating point", whole[0])
    for module, found in sides.items():
        for side in "AB":
            if side not in found:
                raise _fault(file, "missing", f"{prefix}.{module}.lora_{side}.weight")
        weight, (down, up) = modules[module].weight, (found["A"], found["B"])
        fits = len(down) == len(up) == weight.ndim and down[0] == up[1]
        if not fits or down[1:] != tuple(weight.shape[1:]) or up[0] != weight.shape[0]:
            raise _fault(file, "of another shape", f"{prefix}.{module}.lora_A.weight {down}, lora_B.weight {up}")


def _fault(file: Path, kind: str, name: str) -> GeneratorError:
    return GeneratorError(
        f"{file}: trained weights cannot be loaded: {kind}: {name}; train the run again; a LoRA that no run made "
        "is generator.start"
    )
