"""What generators share whose checkpoint is a diffusers pipeline: loading, guidance, LoRA, and what is saved."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import hf_hub_download
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from vipo.config.models import GeneratorConfig, LoraConfig
from vipo.generators.base import NEGATIVE, Conditioning, Generator, GeneratorError, checkpoint_location
from vipo.sampling.noise import keyed_seed

PICTURE_AUTOENCODERS: Mapping[str, Any] = MappingProxyType(
    {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
)

T = TypeVar("T")


class PipelineGenerator(Generator):
    """One network and one autoencoder of a diffusers pipeline.

    A family gives the class attributes, sets `latent_shape` (videos: `frame_groups` too), and writes `encode_prompts`,
    `_predict` and, for videos, `decode`.

    Attributes:
        vae: the autoencoder, frozen.
        pipeline_class: the stock pipeline, which writes LoRA weights the way it reads them.
        network_class: of the trained network.
        autoencoders: autoencoder classes by name.
    """

    network: Any
    vae: Any
    pipeline_class: ClassVar[Any]
    network_class: ClassVar[Any]
    network_folder: ClassVar[str] = "transformer"
    autoencoders: ClassVar[Mapping[str, Any]] = PICTURE_AUTOENCODERS

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
        location = checkpoint_location(config, root)
        index = model_index(location, config.revision)
        cls.check_index(location, index)
        named = {cls.network_class.__name__: cls.network_class}
        parts = [
            load_part(_part_class(location, index, part, known).from_pretrained, location, part, config)
            for part, known in ((cls.network_folder, named), ("vae", cls.autoencoders))
        ]
        # Saved beside trained weights: as the configuration names it, not where this machine or image keeps it.
        parts[0].register_to_config(_name_or_path=config.path)
        return cls(config, *parts)

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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        settings = self.vae.config
        scaled = latents / settings.scaling_factor + (settings.shift_factor or 0.0)
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def add_lora(self, config: LoraConfig, seed: int) -> None:
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
        try:
            if getattr(self.network, "peft_config", None):
                self.network.unload_lora()
            if (folder / "pytorch_lora_weights.safetensors").is_file():
                self.network.load_lora_adapter(folder, prefix=self.network_folder, use_safetensors=True)
            else:
                loaded = self.network_class.from_pretrained(folder, subfolder=self.network_folder, use_safetensors=True)
                self.network = loaded.to(self.device).requires_grad_(False).eval()
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise GeneratorError(f"{folder}: trained weights cannot be loaded: {error}") from error


def model_index(location: Path | str, revision: str | None) -> dict[str, Any]:
    """Content of a checkpoint's ``model_index.json``.

    Raises:
        GeneratorError: it cannot be read.
    """
    try:
        path = (
            location / "model_index.json"
            if isinstance(location, Path)
            else Path(hf_hub_download(location, "model_index.json", revision=revision))
        )
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GeneratorError(f"{location}: model_index.json cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise GeneratorError(f"{location}: model_index.json holds no mapping")
    return index


def load_part(
    loader: Callable[..., T], location: Path | str, part: str, config: GeneratorConfig, *, weights: bool = True
) -> T:
    """One part of a checkpoint by its class's `from_pretrained`; weights only from safetensors, and in fp32: AdamW on
    bf16 weights rounds small updates away.

    Raises:
        GeneratorError: the part is missing or damaged.
    """
    options = {"use_safetensors": True, "torch_dtype": torch.float32} if weights else {}
    try:
        return loader(location, subfolder=part, revision=config.revision, **options)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise GeneratorError(
            f"{location}/{part}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}); "
            "if a file is missing or damaged, copy or download generator.path again"
        ) from error


def load_tokenizer(kind: Any, location: Path | str, part: str, config: GeneratorConfig) -> Any:
    """A tokenizer of a checkpoint.

    Raises:
        GeneratorError: it is missing, damaged or without a vocabulary.
    """
    tokenizer = load_part(kind.from_pretrained, location, part, config, weights=False)
    # transformers makes an empty tokenizer of a folder without a vocabulary: all prompts would read alike.
    if tokenizer("a").input_ids == tokenizer("b").input_ids:
        raise GeneratorError(
            f"{location}/{part}: has no vocabulary (tokenizer.json, or the files it stands for); "
            "copy or download generator.path again"
        )
    return tokenizer


def _part_class(location: Path | str, index: Mapping[str, Any], part: str, known: Mapping[str, Any]) -> Any:
    entry = index.get(part)
    name = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "none"
    if name not in known:
        raise GeneratorError(f"{location}/model_index.json: {part} class {name!r} is not one of {', '.join(known)}")
    return known[name]
