"""What generators share whose checkpoint is a diffusers pipeline: loading, guidance, LoRA, and what is saved."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import GeneratorError, checkpoint_location
from vipo.generators.guidance import GuidedNetworks
from vipo.generators.kernels import use_kernels
from vipo.generators.parts import load_part, model_index, odd_settings, part_class, part_settings, part_without_weights
from vipo.generators.schedules import check_levels, flow_shift, noise_schedule
from vipo.generators.starting import check_start, load_started
from vipo.generators.tiles import decode_in_tiles
from vipo.generators.variants import check_options, check_pair, check_scales, not_held
from vipo.rounding import hold_in_bf16

PICTURE_AUTOENCODERS: Mapping[str, Any] = MappingProxyType(
    {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
)

log = logging.getLogger(__name__)


class PipelineGenerator(GuidedNetworks):
    """The network of a diffusers pipeline, or two by noise level, and its autoencoder.

    A family gives the class attributes, sets `latent_shape` (videos: `frame_groups` too), and writes `encode_prompts`,
    `_predict` and, for videos, `decode`.

    Attributes:
        vae: the autoencoder, frozen.
        pipeline_class: the stock pipeline.
        second_folder: subfolder of a second network of the same class, which acts at low noise.
        autoencoders: autoencoder classes by name.
        token_side: where the stock pipeline shifts the noise levels by the number of tokens, how many latent pixels a
            side a token has.
        ddim: where noise or v is predicted, the scheduler whose chain is the family's.
        longest_sequence: the most text tokens that the stock pipeline reads, where it has a limit.
        widths: of each conditioning tensor, the setting of the network that names its last dimension.
        masks: conditioning tensors that tell which of the tokens are the prompt's.
        folded: whether `out_channels` of an autoencoder with a `patch_size` counts the pixels of a patch.
        decoded_channels: that the autoencoder makes; with transparency, `opaque` says what is shown.
        stock_joins_prompts: whether the stock pipeline makes of several prompts what it makes of each alone.
    """

    vae: Any
    pipeline_class: ClassVar[Any]
    second_folder: ClassVar[str | None] = None
    autoencoders: ClassVar[Mapping[str, Any]] = PICTURE_AUTOENCODERS
    token_side: ClassVar[int | None] = None
    longest_sequence: ClassVar[int | None] = None
    ddim: ClassVar[Any] = DDIMScheduler
    widths: ClassVar[Mapping[str, str]] = MappingProxyType({})
    masks: ClassVar[tuple[str, ...]] = ()
    folded: ClassVar[bool] = True
    decoded_channels: ClassVar[int] = 3
    stock_joins_prompts: ClassVar[bool] = True

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
        self.network = self.prepared(self.placed(network)).requires_grad_(False).eval()
        use_kernels(self.network, config)
        self.vae = vae.to(self.device).requires_grad_(False).eval()
        if config.decoding == "tiled":
            decode_in_tiles(self.vae, config)

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> Self:
        cls.check(config, root)
        location = checkpoint_location(config, root)
        index = model_index(location, config.revision)
        parts = cls.load_parts(config, root, location, cls.part_classes(location, index))
        *networks, vae = parts
        for network in networks:
            # Saved beside trained weights: as the configuration names it, not where this machine or image keeps it.
            network.register_to_config(_name_or_path=config.path)
            if config.weights == "bf16":
                hold_in_bf16(network)
        with odd_settings(config, location):
            generator = cls(config, cls.joined(config, index, networks), vae)
            if cls.prediction == "velocity":
                generator.flow_shift = generator.checkpoint_shift(location)
            else:
                schedule = noise_schedule(location, index, config, cls.ddim)
                generator.alphas_cumprod, generator.timesteps = schedule.alphas_cumprod, schedule.timesteps
                generator.prediction = schedule.prediction
        return generator

    @classmethod
    def joined(cls, config: GeneratorConfig, index: Mapping[str, Any], networks: Sequence[Any]) -> Any:
        """The policy of a checkpoint's networks; of a family with several, it is overridden.

        Args:
            config: section `generator`.
            index: content of ``model_index.json``.
            networks: as `part_classes` orders them.
        """
        [network] = networks
        return network

    def read_no_values(self, *, one_time: bool) -> None:
        """From now on, calls are made without data, as `vipo plan` does: lengths are the longest ones.

        Args:
            one_time: whether all samples of a call have one noise level, as in a rollout.
        """

    @classmethod
    def load_parts(
        cls, config: GeneratorConfig, root: Path, location: Path | str, kinds: Mapping[str, Any]
    ) -> list[Any]:
        """Network and autoencoder, by the subfolders that hold their weights.

        Raises:
            GeneratorError: one is missing or damaged.
        """
        return [
            load_part(kind.from_pretrained, location, part, config)
            if part == "vae"
            else load_started(cls.pipeline_class, kind, location, part, config, root)
            for part, kind in kinds.items()
        ]

    @classmethod
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        location = checkpoint_location(config, root)
        index = model_index(location, config.revision)
        if (kind := index.get("_class_name", cls.pipeline_class.__name__)) != cls.pipeline_class.__name__:
            raise GeneratorError(
                f"{location}/model_index.json: _class_name {kind!r}; family {config.family!r} holds "
                f"{cls.pipeline_class.__name__}: {not_held(str(kind))}"
            )
        check_pair(config, cls.second_folder is not None)
        with odd_settings(config, location):
            cls._check_settings(config, root, location, index)
        if isinstance(location, Path) and config.revision is not None:
            log.warning(
                "generator.revision %s has no effect: generator.path %s is a folder here, which is read as it is",
                config.revision,
                config.path,
            )
        check_options(config, cls.pipeline_class.__name__, cls.guides, cls.neutral_guidance, cls.longest_sequence)

    @classmethod
    def _check_settings(
        cls, config: GeneratorConfig, root: Path, location: Path | str, index: Mapping[str, Any]
    ) -> None:
        cls.check_index(location, index)
        check_start(config, root, cls.network_class, cls.second_folder is not None)
        *networks, vae = (
            part_settings(kind, location, part, config) for part, kind in cls.part_classes(location, index).items()
        )
        for network in networks:
            cls.check_parts(location, network, vae)
        if config.chooses_kernels:
            meta = torch.device("meta")
            use_kernels(part_without_weights(cls.network_class, location, cls.network_folder, config, meta), config)
        if cls.prediction == "velocity":
            check_levels(location, config, cls.token_side is not None)
        else:
            noise_schedule(location, index, config, cls.ddim)
        made, patch = getattr(vae, "out_channels", 3), getattr(vae, "patch_size", None)
        if made != cls.decoded_channels * (patch if cls.folded and isinstance(patch, int) else 1) ** 2:
            told = "red, green and blue" if cls.decoded_channels == 3 else "red, green, blue and transparency"
            raise GeneratorError(f"{location}/vae: out_channels {made}: it makes no pictures of {told}")
        check_scales(location, vae)
        # What encoding and training read.
        cls.conditioning_widths(config, root)

    @classmethod
    def part_classes(cls, location: Path | str, index: Mapping[str, Any]) -> dict[str, Any]:
        """Classes of network and autoencoder, by their subfolders.

        Raises:
            GeneratorError: the index names one that the adapter does not know.
        """
        named = {cls.network_class.__name__: cls.network_class}
        parts = {cls.network_folder: named, "vae": cls.autoencoders}
        if cls.second_folder is not None:
            parts = {cls.network_folder: named, cls.second_folder: named, "vae": cls.autoencoders}
        return {part: part_class(location, index, part, known) for part, known in parts.items()}

    @classmethod
    def conditioning_widths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        settings = part_settings(cls.network_class, checkpoint_location(config, root), cls.network_folder, config)
        found = {name: getattr(settings, key) for name, key in cls.widths.items()}
        # Of a UNet it may be one a block.
        return {name: width for name, width in found.items() if isinstance(width, int)}

    @classmethod
    def conditioning_lengths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        """Tokens of those conditioning tensors that have not ``generator.max_sequence_length``, for `vipo plan`."""
        return {}

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

    @classmethod
    def to_stock(cls, latents: Tensor) -> Tensor:
        """Latents ``(B, *latent_shape)`` as the stock pipeline takes them; a family that packs them says how."""
        return latents

    @classmethod
    def from_stock(cls, stepped: Tensor, shape: torch.Size) -> Tensor:
        """What the stock pipeline gives its scheduler, as `predict` has it: ``(B, *latent_shape)``, here `shape`."""
        return stepped

    @classmethod
    def opaque(cls, pictures: Tensor) -> Tensor:
        """What is shown of decoded pictures ``(B, decoded_channels, H, W)`` in [0, 1]: ``(B, 3, H, W)``."""
        return pictures

    def checkpoint_shift(self, location: Path | str) -> float | Callable[[int], float]:
        """What `flow_shift` is, by the checkpoint's scheduler; it may be overridden."""
        side, (height, width) = self.token_side, self.grid
        frames = len(self.frame_groups or (0,))
        tokens = None if side is None else frames * (height // side) * (width // side)
        return flow_shift(location, self.config, tokens)

    def use_picture_grid(self, channels: int, patch: int = 1) -> None:
        """Set `latent_shape` of an autoencoder for pictures.

        Args:
            channels: of the latents.
            patch: latent pixels that the network takes together, a side.

        Raises:
            GeneratorError: height or width do not fit.
        """
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.check_size(scale * patch)
        self.latent_shape = (channels, self.config.height // scale, self.config.width // scale)

    def latent_scales(self, sides: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents' channels that the autoencoder names, ``(C, 1, ...)`` with `sides` ones."""
        mean, std = (
            torch.tensor(values, device=self.device).view(-1, *[1] * sides)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean, std

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

    def decode(self, latents: Tensor) -> Tensor:
        settings = self.vae.config
        scaled = latents / settings.scaling_factor + (settings.get("shift_factor") or 0.0)
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
