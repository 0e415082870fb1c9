"""What a policy starts from beside a pipeline's folder: a network in one file, a LoRA, a trained run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vipo.config.generator import GeneratorConfig
from vipo.config.resolved import read_mapping
from vipo.config.training import EMA
from vipo.config.validation import ConfigError, validate_section
from vipo.generators.base import GeneratorError, checkpoint_location
from vipo.generators.lora import lora_file
from vipo.generators.merging import merge_lora
from vipo.generators.one_file import load_network_file, readable
from vipo.generators.parts import load_part
from vipo.generators.peft_adapter import WEIGHTS as ADAPTER
from vipo.generators.peft_adapter import is_adapter

_RUN = "config.yaml"


@dataclass(frozen=True)
class Start:
    """Weights that the checkpoint's are replaced by, or that are merged into them.

    Attributes:
        path: a LoRA's file, the folder of an adapter as peft saves it, or that of `Generator.save_network`.
        scale: of a LoRA.
    """

    path: Path
    scale: float

    def lora(self, part: str) -> Path | None:
        """The LoRA's file of a network; None: there is none."""
        if self.path.is_file():
            return self.path
        file = self.path / (ADAPTER if is_adapter(self.path) else lora_file(part))
        return file if file.is_file() else None

    @property
    def whole(self) -> bool:
        """Whether these are whole weights."""
        return self.path.is_dir() and not any(self.path.glob("*.safetensors"))


def starts(config: GeneratorConfig, root: Path) -> list[Start]:
    """What `config.start` names, in the order in which it is applied: what a run started from comes before its own.

    Raises:
        GeneratorError: there is nothing, it is a run of another generator, or one that is not finished.
    """
    found: list[Start] = []
    while config.start is not None:
        path = (root / config.start).resolve()
        if is_adapter(path):
            # Of its file alone nobody knows how strong it is.
            return [Start(path if path.is_dir() else path.parent, config.start_scale), *found]
        if path.is_file():
            if path.suffix != ".safetensors":
                raise GeneratorError(f"generator.start {config.start!r}: is no .safetensors file, and no folder")
            return [Start(path, config.start_scale), *found]
        run = _run_of(path)
        weights = path / "weights" if run == path else path
        if not (run / _RUN).is_file() and any(path.glob("pytorch_lora_weights*.safetensors")):
            return [Start(path, config.start_scale), *found]
        if not (run / _RUN).is_file() or not weights.is_dir():
            raise GeneratorError(
                f"generator.start {config.start!r}: no LoRA file, and no trained run: give "
                "results/<experiment>/runs/<arm>-s<seed>, its weights/, a LoRA's .safetensors file, or the folder of "
                "an adapter that peft saved"
            )
        if any(start.path == weights for start in found):
            raise GeneratorError(f"generator.start {config.start!r}: the run started from itself")
        trained = _trained(run / _RUN)
        for key in ("family", "path", "revision", "file", "file_2"):
            if (own := getattr(trained, key)) != (now := getattr(config, key)):
                raise GeneratorError(
                    f"generator.start {config.start!r}: that run trained generator.{key} {own!r}, not {now!r}; its "
                    "weights belong to that checkpoint"
                )
        found.insert(0, Start(weights, config.start_scale))
        # Whole weights hold all that came before them.
        if found[0].whole:
            if found[0].scale != 1:
                raise GeneratorError(
                    f"generator.start_scale {found[0].scale:g}: {weights} holds whole weights, no LoRA; leave it at 1"
                )
            if trained.experts == "both":
                return found
        config = trained
    return found


def _run_of(path: Path) -> Path:
    """The run that a folder of weights, or of their mean, is in; of any other folder itself."""
    folder = path.parent if path.name == EMA else path
    if folder.name == "weights":
        return folder.parent
    return folder.parent.parent if folder.parent.name == "updates" else path


def _trained(file: Path) -> GeneratorConfig:
    try:
        return validate_section(GeneratorConfig, read_mapping(file).get("generator"), "generator.")
    except (ValueError, ConfigError) as error:
        raise GeneratorError(f"generator.start: {file} is no run's configuration: {error}") from error


def checkpoint_inputs(config: GeneratorConfig, root: Path) -> list[Path]:
    """The checkpoint as inputs of a stage: its local folder (a hub id is pinned by its commit), file and start."""
    location = checkpoint_location(config, root)
    folder = [location] if isinstance(location, Path) else []
    return [*folder, *single_files(config, root), *(start.path for start in starts(config, root))]


def single_files(config: GeneratorConfig, root: Path) -> list[Path]:
    """The files that `config.file` and `config.file_2` name, of one network each.

    Raises:
        GeneratorError: there is none, or it is no safetensors file.
    """
    named = {key: own for key in ("file", "file_2") if (own := getattr(config, key)) is not None}
    paths = [(root / own).resolve() for own in named.values()]
    for (key, own), path in zip(named.items(), paths, strict=True):
        if not path.is_file() or path.suffix != ".safetensors":
            raise GeneratorError(
                f"generator.{key} {own!r}: there is no such .safetensors file; generator.path is then the folder "
                "with the pipeline's configurations, tokenizers, text encoders and autoencoder"
            )
    return paths


def check_start(config: GeneratorConfig, root: Path, network_class: Any, pair: bool) -> None:
    """Refuse what weights cannot be started from, before any are read.

    Args:
        config: section `generator`.
        root: repository root, for relative paths.
        network_class: of the network, or of both.
        pair: whether the family has two networks.

    Raises:
        GeneratorError: naming the key.
    """
    found = starts(config, root)
    if pair and any(start.path.is_file() or is_adapter(start.path) for start in found):
        raise GeneratorError(
            f"generator.start: family {config.family!r} has two networks, and one LoRA does not say which; give a "
            "folder with pytorch_lora_weights.safetensors and pytorch_lora_weights_2.safetensors, or a trained run"
        )
    files = single_files(config, root)
    if pair and len(files) == 1:
        raise GeneratorError(
            f"generator.file: family {config.family!r} has two networks; give the other's, for low noise, as "
            "generator.file_2"
        )
    if files and not readable(network_class):
        raise GeneratorError(
            f"generator.file: neither vipo nor diffusers knows how the files of a {network_class.__name__} name its "
            "tensors; give the pipeline's folder as generator.path alone"
        )


def load_started(
    pipeline_class: Any, kind: Any, location: Path | str, part: str, config: GeneratorConfig, root: Path
) -> Any:
    """A network as the configuration starts it: of the folder, one file or a run, with LoRAs merged; in fp32.

    Args:
        pipeline_class: the stock pipeline.
        kind: class of the network.
        location: folder or hub id.
        part: subfolder of the network.
        config: section `generator`.
        root: repository root, for relative paths.

    Raises:
        GeneratorError: a file is missing or damaged, or does not hold what the network takes.
    """
    found = starts(config, root)
    # Whole weights hold all that came before them, none of which is read.
    whole = [number for number, start in enumerate(found) if start.whole and (start.path / part).is_dir()]
    if whole:
        folder, found = found[whole[-1]].path, found[whole[-1] + 1 :]
        network = load_part(kind.from_pretrained, folder, part, config, remedy="train that run again")
    elif files := single_files(config, root):
        network = load_network_file(kind, location, part, config, files[part.endswith("_2")])
    else:
        network = load_part(kind.from_pretrained, location, part, config)
    for start in found:
        if (file := start.lora(part)) is not None:
            merge_lora(pipeline_class, part, network, file, start.scale)
    return network
