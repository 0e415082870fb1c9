"""A LoRA merged into a network's weights: its names are the stock pipeline's to read, and no part of it is lost."""

import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vipo.generators.base import GeneratorError
from vipo.generators.lora_layers import held_once, in_weights
from vipo.generators.parts import not_floating, stored_dtypes
from vipo.generators.peft_adapter import CONFIG, WEIGHTS, adapter_layers, is_adapter
from vipo.text import cause, listed

log = logging.getLogger(__name__)

# Beside the network: its text encoders, and what LTX-2 has between them and it.
_TEXTS = re.compile(
    r"(text_encoder|lora_te|conditioner|cond_stage|(diffusion_model\.)?text_embedding_projection|connectors)"
)
# How the tensors of a LoRA end, in every naming; of others diffusers leaves out some without an error.
_UP = re.compile(r".*(lora_B(\.default)?\.weight|lora(_linear_layer|[12])?[._]up\.weight)\Z")
_LORA = re.compile(
    r".*(lora_[AB](\.default)?\.weight|lora(_linear_layer|[12])?[._](down|up)\.weight|\.alpha|\.lora_B\.bias"
    r"|\.lora_magnitude_vector(\.weight)?)\Z"
)
# Full differences beside a LoRA: of weights and of biases.
_DIFFERENCES = (".diff", ".diff_b")
_NAMED = 2
# What diffusers and peft say of a LoRA's strength in a file's header.
_METADATA = "lora_adapter_metadata"
# The halves of this layer's rows are the other way around in diffusers, where it is `norm_out.linear`.
_TURNED = re.compile(r".*final_layer[._]adaLN_modulation[._]1\.lora_(B|up)\.weight\Z")


def _noting(network: Any) -> dict[str, Tensor]:
    """The LoRA tensors that the network is going to be given, once, converted."""
    given: dict[str, Tensor] = {}
    layers = {name for name, _ in network.named_modules()}

    def load(state: Mapping[str, Any], prefix: str = "transformer", **more: Any) -> Any:
        # FLUX.1's conversion leaves the prefix out of what stands outside of the blocks, and what has none is dropped.
        named = {f"{prefix}.{name}" if name.split(".lora_")[0] in layers else name: state[name] for name in state}
        given.update(named)
        del network.load_lora_adapter
        return network.load_lora_adapter(named, prefix=prefix, **more)

    network.load_lora_adapter = load
    return given


def _check_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what diffusers would leave out, and whose strength stands elsewhere."""
    if texts := [name for name in tensors if _TEXTS.match(name)]:
        raise GeneratorError(
            f"{file}: adapts text encoders too, or what connects them ({texts[0]}), which vipo does not; give the file "
            "without"
        )
    if strange := [name for name in tensors if not _LORA.match(name) and not name.endswith(_DIFFERENCES)]:
        raise GeneratorError(
            f"{file}: is more than a LoRA, or none ({listed(strange, _NAMED)}): DoRA's dora_scale, LoKr, LoHa and "
            "whole weights are not merged here; merge it with the program that made it and give generator.file"
        )
    adapter = file.name == WEIGHTS or (file.parent / CONFIG).is_file()
    if adapter and (own := [name for name in tensors if name.startswith("base_model.model.")]):
        raise GeneratorError(
            f"{file}: is an adapter as peft saves it ({own[0]}), whose strength stands in {CONFIG}: give a folder with "
            f"that and the weights as {WEIGHTS}"
        )


def _check_header(file: Path) -> None:
    with safe_open(file, framework="pt") as stream:
        if _METADATA in (stream.metadata() or {}):
            raise GeneratorError(
                f"{file}: its tensors say how strong it is, or hold a layer twice, and its header has {_METADATA} "
                "too; give the file without one of them"
            )


def _check_handed_on(file: Path, tensors: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse a file of which diffusers' conversion left something out: it tells only a log of it."""
    differences = [name for name in tensors if name.endswith(_DIFFERENCES) and tensors[name].any()]
    if lost := [name for name in differences if not any(_same(tensors[name], own) for own in given.values())]:
        raise GeneratorError(
            f"{file}: changes weights beside its LoRA that the stock pipeline leaves out ({listed(lost, _NAMED)}); "
            "merge it with the program that made it and give generator.file"
        )
    # Conversions split what one layer is of several here, and scale; the rows stay.
    held, read = (sum(len(of[name]) for name in of if _UP.match(name)) for of in (tensors, given))
    if read < held:
        raise GeneratorError(
            f"{file}: of {held} rows of its LoRA the stock pipeline reads {read}: it leaves out names that it does not "
            "know, and those of another naming than most; give a file of one naming"
        )
    outs = [value for name, value in given.items() if name.endswith("norm_out.linear.lora_B.weight")]
    if turned := [name for name in tensors if _TURNED.match(name) and any(_same(tensors[name], out) for out in outs)]:
        raise GeneratorError(
            f"{file}: {turned[0]}: the stock pipeline adds its shift to the scale and its scale to the shift; give the "
            "file without that layer"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def merge_lora(pipeline_class: Any, part: str, network: Any, file: Path, scale: float) -> None:
    """Add a LoRA to a network's weights, in any naming that the stock pipeline reads, each layer with its own alpha.

    Args:
        pipeline_class: the stock pipeline.
        part: subfolder of the network.
        network: in fp32, without an adapter; changed in place.
        file: safetensors.
        scale: beside the file's own.

    Raises:
        GeneratorError: the file is damaged, fits no module, or holds what the stock pipeline would leave out or scale
            otherwise.
    """
    try:
        # The files of a second network name the first one.
        named = part.removesuffix("_2")
        tensors = load_file(file)
        read: Mapping[str, Tensor] = adapter_layers(file, tensors, named) if is_adapter(file) else tensors
        _check_tensors(file, read)
        if whole := not_floating(stored_dtypes([file]), ("alpha",)):
            raise GeneratorError(f"{file}: not of floating point: {listed(whole, _NAMED)}")
        state = in_weights(file, held_once(file, read), named)
        # By itself, a file brings what its header says.
        source: Any = file.parent
        options: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
        if state is not tensors:
            _check_header(file)
            source, options = dict(state), {}
        if hasattr(pipeline_class, "load_lora_weights"):
            given = _noting(network)
            # Without its constructor, which may read a tokenizer.
            pipeline = pipeline_class.__new__(pipeline_class)
            pipeline.register_modules(**dict.fromkeys(inspect.signature(pipeline_class).parameters) | {named: network})
            pipeline.load_lora_weights(source, **options)
        else:
            given = dict(state)
            network.load_lora_adapter(source, prefix=part, **options)
        _check_handed_on(file, state, given)
        layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
        adapted = list(layers)
        if not adapted:
            raise GeneratorError(f"{file}: adapts no module of {type(network).__name__} ({next(iter(tensors))}, …)")
        held = sum(".lora_" in name for name, _ in network.named_parameters())
        if held != len(given):
            # diffusers goes on without those that fit nothing, and draws those that are missing.
            strange = [name for name in given if not any(f".{module}." in f".{name}" for module in adapted)]
            raise GeneratorError(
                f"{file}: holds {len(given)} LoRA tensors, and {type(network).__name__} takes {held} of such modules"
                + (f"; it has no module for {listed(strange, _NAMED)}" if strange else "")
            )
        if state is not tensors:
            for layer in layers.values():
                layer.scaling = dict.fromkeys(layer.scaling, 1.0)
        network.fuse_lora(lora_scale=scale, safe_fusing=True)
        network.unload_lora()
    except GeneratorError:
        raise
    except (SafetensorError, OSError) as error:
        raise GeneratorError(f"{file}: cannot be read: {error}") from error
    except Exception as error:
        raise GeneratorError(
            f"{file}: cannot be merged into {type(network).__name__} by its names ({next(iter(tensors))}, …): "
            f"{cause(error)}"
        ) from error
    log.info("%s: merged into %d modules of the %s, scale %g", file, len(adapted), part, scale)
