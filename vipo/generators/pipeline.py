"""What generators share whose checkpoint is a diffusers pipeline: loading, guidance, LoRA, and what is saved."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.config.training import LoraConfig
from vipo.generators.base import NEGATIVE, Conditioning, Generator, GeneratorError, checkpoint_location
from vipo.generators.lora import LORA_FILE, check_file, check_targets
from vipo.generators.parts import load_part, model_index, part_class, part_settings
from vipo.keys import keyed_seed

PICTURE_AUTOENCODERS: Mapping[str, Any] = MappingProxyType(
    {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
)

log = logging.getLogger(__name__)


class PipelineGenerator(Generator):
    """One network and one autoencoder of a diffusers pipeline.

    A family gives the class attributes, sets `latent_shape` (videos: `frame_groups` too), and writes `encode_prompts`,
    `_predict` and, for videos, `decode`.

    Attributes:
        vae: the autoencoder, frozen.
        pipeline_class: the stock pipeline, which writes LoRA weights the way it reads them.
        network_class: of the trained network.
        autoencoders: autoencoder classes by name.
        guides: whether the family is guided away from `negative_prompt`.
        widths: of each conditioning tensor, the setting of the network that names its last dimension.
    """

    network: Any
    vae: Any
    pipeline_class: ClassVar[Any]
    network_class: ClassVar[Any]
    network_folder: ClassVar[str] = "transformer"
    autoencoders: ClassVar[Mapping[str, Any]] = PICTURE_AUTOENCODERS
    guides: ClassVar[bool] = True
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, config: GeneratorConfig, network: Any, vae: Any) -> None:
        """Take loaded parts.

        Raises:
            GeneratorError: `config.frames` is set for a family of pictures, or missing for one of videos.
        """
        if (config.frames is None) != (self.frame_rate is None):
            what = "pictures: leave it null" if self.frame_rate is None else "videos: set how many frames"
            raise GeneratorError(f"generator.frames {config.frames}: family {config.family!r} makes {what}")
        self.config = config
        self.device = torch.device(config.device)
        self.network = network.to(self.device).requires_grad_(False).eval()
        self.vae = vae.to(self.device).requires_grad_(False).eval()

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> Self:
        cls.check(config, root)
        location = checkpoint_location(config, root)
        index = model_index(location, config.revision)
        parts = [
            load_part(kind.from_pretrained, location, part, config)
            for part, kind in cls._part_classes(location, index).items()
        ]
        # Saved beside trained weights: as the configuration names it, not where this machine or image keeps it.
        parts[0].register_to_config(_name_or_path=config.path)
        return cls(config, *parts)

    @classmethod
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        location = checkpoint_location(config, root)
        index = model_index(location, config.revision)
        if (kind := index.get("_class_name", cls.pipeline_class.__name__)) != cls.pipeline_class.__name__:
            raise GeneratorError(
                f"{location}/model_index.json: _class_name {kind!r}; family {config.family!r} holds "
                f"{cls.pipeline_class.__name__}: give such a checkpoint, or another generator.family"
            )
        cls.check_index(location, index)
        network, vae = (
            part_settings(kind, location, part, config) for part, kind in cls._part_classes(location, index).items()
        )
        cls.check_parts(location, network, vae)
        made = getattr(vae, "out_channels", 3)
        if made != 3 * (getattr(vae, "patch_size", None) or 1) ** 2:
            raise GeneratorError(f"{location}/vae: out_channels {made}: it makes no pictures of red, green and blue")
        if isinstance(location, Path) and config.revision is not None:
            log.warning(
                "generator.revision %s has no effect: generator.path %s is a folder here, which is read as it is",
                config.revision,
                config.path,
            )
        if not cls.guides and config.negative_prompt:
            raise GeneratorError(
                f"generator.negative_prompt: family {config.family!r} has no classifier-free guidance, so it would "
                "have no effect; leave it empty"
            )
        if cls.guides and config.negative_prompt and config.guidance_scale <= 1:
            log.warning(
                "generator.negative_prompt has no effect: generator.guidance_scale %s is not above 1, which turns "
                "classifier-free guidance off",
                config.guidance_scale,
            )

    @classmethod
    def _part_classes(cls, location: Path | str, index: Mapping[str, Any]) -> dict[str, Any]:
        named = {cls.network_class.__name__: cls.network_class}
        return {
            part: part_class(location, index, part, known)
            for part, known in ((cls.network_folder, named), ("vae", cls.autoencoders))
        }

    @classmethod
    def conditioning_widths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        settings = part_settings(cls.network_class, checkpoint_location(config, root), cls.network_folder, config)
        found = {name: getattr(settings, key) for name, key in cls.widths.items()}
        # Of a UNet it may be one a block.
        return {name: width for name, width in found.items() if isinstance(width, int)}

    @classmethod
    def check_parts(cls, location: Path | str, network: Any, vae: Any) -> None:
        """Refuse a network that needs more than the adapter gives it, or an autoencoder that does not fit it.

        Args:
            location: folder or hub id, for the message.
            network, vae: settings of both, as their ``config.json`` and their classes' defaults have them.

        Raises:
            GeneratorError: naming the setting.
        """

    @classmethod
    def check_index(cls, location: Path | str, index: Mapping[str, Any]) -> None:
        """Refuse a variant of the family that the adapter does not hold, before anything is loaded.

        Args:
            location: folder or hub id, for the message.
            index: content of ``model_index.json``.

        Raises:
            GeneratorError: the checkpoint is such a variant.
        """

    def check_size(self, multiple: int) -> None:
        """Refuse a height or width in pixels that is no multiple.

        Raises:
            GeneratorError: naming the key.
        """
        for key in ("height", "width"):
            if (value := getattr(self.config, key)) % multiple:
                raise GeneratorError(
                    f"generator.{key} {value} is not a multiple of {multiple} (autoencoder x patches of the network)"
                )

    def guided(
        self,
        call: Callable[[Tensor, Tensor, Conditioning], Tensor],
        latents: Tensor,
        time: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): ``n + scale (p - n)`` of the negative and the
        positive prediction. As in the stock pipelines, there is none at a scale of 1 or below.

        Both branches share one network call, in the rollout and in the update alike: the wrapper that trains on several
        devices writes the network's buffers at every call, which a second call before the backward pass would undo.

        Args:
            call: predicts from latents, time and conditioning of one batch.
            latents, time, conditioning: as in `predict`; every name has a counterpart that begins with `NEGATIVE`.
        """
        positive = {name: value for name, value in conditioning.items() if not name.startswith(NEGATIVE)}
        scale = self.config.guidance_scale
        if scale <= 1:
            return call(latents, time, positive)
        both = {name: torch.cat([conditioning[NEGATIVE + name], value]) for name, value in positive.items()}
        without, wanted = call(torch.cat([latents] * 2), torch.cat([time] * 2), both).float().chunk(2)
        return without + scale * (wanted - without)

    def decode(self, latents: Tensor) -> Tensor:
        settings = self.vae.config
        scaled = latents / settings.scaling_factor + (settings.shift_factor or 0.0)
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        check_targets(self.network, config.targets)
        # peft draws the initial A matrices from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(seed, "lora"))
            try:
                self.network.add_adapter(
                    PeftLoraConfig(
                        r=config.rank,
                        lora_alpha=config.alpha,
                        init_lora_weights=True,
                        target_modules=list(config.targets),
                    )
                )
            except ValueError as error:
                raise GeneratorError(f"training.lora.targets {list(config.targets)}: {error}") from error

    def save_network(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        if getattr(self.network, "peft_config", None):
            # Loaders take alpha for the rank unless metadata says otherwise, and metadata is written in random order:
            # with the scale in B, every loader has the trained policy and the file has the same bytes each time.
            (adapter,) = self.network.peft_config.values()
            scale = adapter.lora_alpha / adapter.r
            layers = {
                name: value * scale if ".lora_B." in name else value
                for name, value in get_peft_model_state_dict(
                    self.network, None if state is None else dict(state)
                ).items()
            }
            self.pipeline_class.save_lora_weights(folder, **{f"{self.network_folder}_lora_layers": layers})
        else:
            network = self.network
            if state is not None:
                with torch.device("meta"):
                    network = self.network_class.from_config(self.network.config)
                network.load_state_dict(state, assign=True)
            # Loading noted the folder's absolute path: the same weights would have other bytes in another checkout.
            network.register_to_config(_name_or_path=self.config.path)
            network.save_pretrained(folder / self.network_folder, safe_serialization=True)

    def load_network(self, folder: Path) -> None:
        if getattr(self.network, "peft_config", None):
            self.network.unload_lora()
        if not (folder / LORA_FILE).is_file():
            remedy = "train the run again"
            loaded = load_part(
                self.network_class.from_pretrained, folder, self.network_folder, self.config, remedy=remedy
            )
            self.network = loaded.to(self.device).requires_grad_(False).eval()
            return
        try:
            check_file(folder / LORA_FILE, self.network, self.network_folder)
            self.network.load_lora_adapter(folder, prefix=self.network_folder, use_safetensors=True)
        except GeneratorError:
            raise
        except Exception as error:
            raise GeneratorError(f"{folder}: trained weights cannot be loaded: {error}; train the run again") from error


def refuse_settings(location: Path | str, part: str, settings: Any, keys: Mapping[str, str]) -> None:
    """Refuse a part that has one of some settings.

    Args:
        location, part: for the message.
        settings: of the part.
        keys: what a setting makes the network ask for, by its name.

    Raises:
        GeneratorError: naming the first that is set.
    """
    for key, needs in keys.items():
        if (value := getattr(settings, key, None)) not in (None, False):
            raise GeneratorError(
                f"{location}/{part}: {key} {value!r}: its network {needs}, which vipo does not give it"
            )
