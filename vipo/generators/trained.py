"""Trained networks in the diffusers layout: LoRA, and what is saved and loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.config.training import LoraConfig
from vipo.generators.base import Generator, GeneratorError
from vipo.generators.kernels import use_kernels
from vipo.generators.lora import check_file, check_targets, lora_file
from vipo.generators.parts import load_part
from vipo.keys import keyed_seed
from vipo.rounding import hold_in_bf16


class TrainedNetworks(Generator):
    """A generator whose networks are diffusers', one or several.

    Attributes:
        network_class: of the trained networks.
        network_folder: subfolder of the first one, and what the names in its LoRA file begin with.
    """

    network: Any
    network_class: ClassVar[Any]
    network_folder: ClassVar[str] = "transformer"

    @property
    def networks(self) -> Mapping[str, Any]:
        """What is trained, by the subfolders of the diffusers layout."""
        return {self.network_folder: self.network}

    def placed(self, network: Any) -> Any:
        """A network where it is used, on the generator's device."""
        return network.to(self.device)

    @classmethod
    def prepared(cls, network: Any) -> Any:
        """A network as the family calls it, wherever it is; its weights and their names stay what they are."""
        return network

    def replace_network(self, part: str, loaded: Any) -> None:
        """Take another network for one of `networks`."""
        self.network = loaded

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        # peft draws the initial A matrices from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(seed, "lora"))
            for network in self.networks.values():
                check_targets(network, config.targets, self.untrained)
                try:
                    network.add_adapter(
                        PeftLoraConfig(
                            r=config.rank,
                            lora_alpha=config.alpha,
                            init_lora_weights="gaussian" if config.init == "gaussian" else True,
                            target_modules=list(config.targets),
                            exclude_modules=self.untrained or None,
                        )
                    )
                except ValueError as error:
                    raise GeneratorError(f"training.lora.targets {list(config.targets)}: {error}") from error
        self._adapters_in_fp32()

    def _adapters_in_fp32(self) -> None:
        # peft gives an adapter the type of the weights beside it.
        for network in self.networks.values():
            for module in network.modules():
                if isinstance(module, LoraLayer):
                    module.lora_A.float()
                    module.lora_B.float()

    def save_network(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        for part, network in self.networks.items():
            # A policy of several networks has them under their names.
            prefix = "" if network is self.network else f"{part}."
            own = None
            if state is not None:
                own = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
            if getattr(network, "peft_config", None):
                self._save_lora(folder, part, network, own)
            else:
                self._save_whole(folder, part, network, own)

    def _save_lora(self, folder: Path, part: str, network: Any, state: dict[str, Tensor] | None) -> None:
        # Loaders take alpha for the rank unless metadata says otherwise, and metadata is written in random order:
        # with the scale in B, every loader has the trained policy and the file has the same bytes each time.
        (adapter,) = network.peft_config.values()
        scale = adapter.lora_alpha / adapter.r
        layers = {
            f"{self.network_folder}.{name}": value * scale if ".lora_B." in name else value.contiguous()
            for name, value in get_peft_model_state_dict(network, state).items()
        }
        # As the pipelines' own `save_lora_weights` do, which not all of them have.
        folder.mkdir(parents=True, exist_ok=True)
        save_file(layers, folder / lora_file(part), metadata={"format": "pt"})

    def _save_whole(self, folder: Path, part: str, network: Any, state: dict[str, Tensor] | None) -> None:
        if state is not None:
            with torch.device("meta"):
                network = self.network_class.from_config(network.config)
            network.load_state_dict(state, assign=True)
        # Loading noted the folder's absolute path: the same weights would have other bytes in another checkout.
        network.register_to_config(_name_or_path=self.config.path)
        network.save_pretrained(folder / part, safe_serialization=True)

    def load_network(self, folder: Path) -> None:
        for part, network in self.networks.items():
            if getattr(network, "peft_config", None):
                network.unload_lora()
            if not (folder / lora_file(part)).is_file():
                # Nobody needs its weights any more, and two networks may be more than there is memory for.
                network.to("meta")
                remedy = "train the run again"
                loaded = load_part(self.network_class.from_pretrained, folder, part, self.config, remedy=remedy)
                if self.config.weights == "bf16":
                    hold_in_bf16(loaded)
                placed = self.prepared(self.placed(loaded)).requires_grad_(False).eval()
                use_kernels(placed, self.config)
                self.replace_network(part, placed)
            else:
                self._load_lora(folder / lora_file(part), network)

    def _load_lora(self, file: Path, network: Any) -> None:
        prefix = self.network_folder
        try:
            check_file(file, network, prefix)
            network.load_lora_adapter(file.parent, prefix=prefix, weight_name=file.name, use_safetensors=True)
            if self.config.weights == "bf16":
                self._adapters_in_fp32()
                stored = load_file(file, device=str(self.device))
                (name,) = network.peft_config
                layers = {key.removeprefix(f"{prefix}."): value for key, value in stored.items()}
                set_peft_model_state_dict(network, layers, name)
        except GeneratorError:
            raise
        except Exception as error:
            raise GeneratorError(
                f"{file.parent}: trained weights cannot be loaded: {error}; train the run again"
            ) from error
