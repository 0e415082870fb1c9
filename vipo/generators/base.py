"""What a generator adapter is."""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vipo.config.generator import GeneratorConfig
from vipo.config.registries import FAMILIES
from vipo.config.training import LoraConfig
from vipo.errors import VipoError
from vipo.generators.attention import TextAttention
from vipo.repeatable import RepeatableGradients
from vipo.text import cause

Prediction = Literal["velocity", "noise", "v"]
"""What a network predicts: the velocity ``noise - x0`` of flow matching, or of a variance-preserving diffusion the
noise, or ``v = sqrt(alpha) noise - sqrt(1 - alpha) x0``."""

Conditioning = Mapping[str, Tensor]
"""What the network is conditioned on, by name; the first dimension is the batch."""

NEGATIVE = "negative_"
"""Conditioning names that begin so are the negative prompt's; the rest of the name is its counterpart's."""


class GeneratorError(VipoError):
    """A generator cannot be loaded or called; the message names the folder or key and the fix."""


class Generator(ABC):
    """A frozen decoder and a network that can be trained.

    Attributes:
        config: section `generator`.
        device: where network and decoder are.
        network: the module whose weights are post-trained, in eval mode, float32.
        latent_shape: ``(C, H, W)`` of one sample's latents, ``(C, T, H, W)`` of a video's.
        frame_groups: of a video, the decoded frames that each latent frame stands for; None for images.
        frame_rate: frames per second at which the family's videos play; None for images.
        network_folder: subfolder of the network in the diffusers layout.
        text_attention: where the network attends to the prompt, and to which words; None: it is not known.
        prompt_tokenizers: subfolders of the tokenizers that read whole prompts; None: all of ``tokenizer*``.
        untrained: matches the names of the network's modules and weights that have no way to a prediction, and that no
            run trains; empty: none.
        stock_forced: arguments of the network that the stock pipeline gives another value, or has no words for.
        prediction: what the network predicts.
        alphas_cumprod: where that is noise or v, the share of signal variance at each training timestep,
            ``(timesteps,)`` float32 on the CPU; None for flow matching.
        timesteps: likewise, the training timesteps ``(T,)`` int64 that the checkpoint's scheduler visits in T steps,
            from noise to data; None: "leading" spacing with offset 1.
        flow_shift: of flow matching, the time shift that the checkpoint's scheduler applies at this size, or that by
            the number of steps; None where it is not known.
    """

    config: GeneratorConfig
    device: torch.device
    network: nn.Module
    latent_shape: tuple[int, ...]
    frame_groups: tuple[range, ...] | None = None
    frame_rate: ClassVar[int | None] = None
    alphas_cumprod: Tensor | None = None
    timesteps: Callable[[int], Tensor] | None = None
    flow_shift: float | Callable[[int], float] | None = None
    network_folder: ClassVar[str]
    text_attention: ClassVar[TextAttention | None] = None
    prompt_tokenizers: ClassVar[Sequence[str] | None] = None
    untrained: ClassVar[str] = ""
    stock_forced: ClassVar[Mapping[str, object]] = MappingProxyType({})
    prediction: Prediction = "velocity"

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latents in positions."""
        height, width = self.latent_shape[-2:]
        return height, width

    @classmethod  # noqa: B027 (an adapter need not refuse anything)
    def check(cls, config: GeneratorConfig, root: Path) -> None:
        """Refuse what the adapter does not hold by the checkpoint's small files, before any weights are read.

        Raises:
            GeneratorError: the checkpoint is a variant that the adapter does not hold, or an option has no effect.
        """

    @classmethod
    def stock_arguments(cls, config: GeneratorConfig) -> Mapping[str, object]:
        """Arguments of the stock pipeline that are not named, or not meant, as the configuration's keys."""
        return {}

    @classmethod
    def stock_guidance(cls, config: GeneratorConfig) -> float | None:
        """The scale of a stock pipeline that is guided by its part `guider`; None: its call takes the scale."""
        return None

    @classmethod
    def conditioning_widths(cls, config: GeneratorConfig, root: Path) -> Mapping[str, int]:
        """The last dimension that the network takes of each conditioning tensor, by name, as far as it is known."""
        return {}

    @classmethod
    @abstractmethod
    def load(cls, config: GeneratorConfig, root: Path) -> "Generator":
        """Load network and decoder (no text encoder) from a diffusers checkpoint.

        Raises:
            GeneratorError: a file is missing, damaged or of another class.
        """

    @classmethod
    @abstractmethod
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Conditioning of each prompt, without the batch dimension, float32 on the CPU.

        Names that begin with `NEGATIVE` are those of `config.negative_prompt`, the same for every prompt: they are
        stored once.

        Raises:
            GeneratorError: a tokenizer or text encoder is missing or damaged.
        """

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction (see `prediction`), guidance included, under the configured precision.

        Args:
            latents: ``(B, *latent_shape)`` float32.
            time: ``(B,)``, the noise level sigma in (0, 1] of flow matching, or the training timestep (see
                `vipo.sampling.chain.Chain`).
            conditioning: of the batch.

        Returns:
            Like `latents`, float32.

        Raises:
            ValueError: `latents` has another shape.
            GeneratorError: adapter or network raised, the prediction has another shape, or one wrote into what it was
                given.
        """
        expected = (len(time), *self.latent_shape)
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents: expected shape {expected} (B, *latent_shape), got {tuple(latents.shape)}")
        given = {"latents": latents, "time": time, **conditioning}
        written = {name: value._version for name, value in given.items()}
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with autocast, self._named("its network computes no prediction"):
            prediction = self._predict(latents, time, conditioning)
        self._check_unwritten("prediction", given, written)
        if not isinstance(prediction, Tensor) or prediction.shape != latents.shape:
            raise self._misshapen("prediction", tuple(latents.shape), prediction)
        return prediction.float()

    def pictures(self, latents: Tensor, *, gradient: bool = False) -> Tensor:
        """`decode`, checked.

        Args:
            gradient: keep what a gradient back to the latents needs; an adapter whose `decode` cuts it gives pictures
                without one.

        Raises:
            GeneratorError: the adapter raised, gave something else than ``(B, *config.sample_shape)``, or wrote into
                its latents.
        """
        written = latents._version
        with torch.set_grad_enabled(gradient), RepeatableGradients(), self._named("its autoencoder decodes no latents"):
            decoded = self.decode(latents)
        self._check_unwritten("decode", {"latents": latents}, {"latents": written})
        expected = (len(latents), *self.config.sample_shape)
        if not isinstance(decoded, Tensor) or tuple(decoded.shape) != expected:
            raise self._misshapen("decode", expected, decoded)
        return decoded

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        # Checkpoints' configurations may say anything, and much of it is first read by a call.
        try:
            yield
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            # What is derived of it tells of the device or the compiler, and of several processes it may tell of another
            # one; what kernels that were chosen do not take is told with their key, and what another adapter raises is
            # its own.
            derived = isinstance(error, RuntimeError) and (type(error) is not RuntimeError or dist.is_initialized())
            if derived or self.config.chooses_kernels or self.config.family not in FAMILIES:
                raise
            told = GeneratorError(
                f"generator.path {self.config.path}: {what} ({cause(error)}); the settings in its config.json may not "
                "go together: copy or download generator.path again"
            )
            told.foreign = True
            raise told from error

    def _check_unwritten(self, call: str, given: Mapping[str, Tensor], before: Mapping[str, int]) -> None:
        # The update calls the network again on the very states that the rollout keeps.
        changed = [name for name, value in given.items() if value._version != before[name]]
        if changed:
            raise GeneratorError(
                f"generator.family {self.config.family!r}: {call} writes into the {', '.join(changed)} that it is "
                "given, which the update reads again; let it work on a copy (clone())"
            )

    def _misshapen(self, call: str, expected: tuple[int, ...], got: object) -> GeneratorError:
        what = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else f"a {type(got).__name__}"
        return GeneratorError(f"generator.family {self.config.family!r}: {call}: expected shape {expected}, got {what}")

    @abstractmethod
    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network call behind `predict`: time mapping, packing and guidance of the family."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents to images or videos ``(B, *config.sample_shape)`` in [0, 1], float32; call it by `pictures`."""

    def train_weights(self) -> None:
        """Let all of the network's weights be trained but those that are `untrained`."""
        self.network.requires_grad_(True)
        for name, value in self.network.named_parameters():
            if re.fullmatch(self.untrained, name):
                value.requires_grad_(False)

    @abstractmethod
    def add_lora(self, config: LoraConfig, seed: int) -> None:
        """Add a LoRA adapter with keyed initial weights; only its weights are trained from then on."""

    def recompute_activations(self) -> None:
        """From now on, keep no activations of the network's blocks for the backward pass (gradient checkpointing).

        Raises:
            GeneratorError: the network cannot.
        """
        enable = getattr(self.network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise GeneratorError(f"training.gradient_checkpointing: {type(self.network).__name__} does not offer it")
        enable()

    @abstractmethod
    def save_network(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the network, or its LoRA weights, so that the stock pipeline loads it.

        Args:
            folder: exists.
            state: the network's whole state, where the network itself holds pieces of it (FSDP2).
        """

    @abstractmethod
    def load_network(self, folder: Path) -> None:
        """Load what `save_network` wrote.

        Raises:
            GeneratorError: the folder is missing or damaged.
        """


def checkpoint_location(config: GeneratorConfig, root: Path) -> Path | str:
    """The local folder of a checkpoint, or its hub id.

    Raises:
        GeneratorError: there is no such folder and no revision that would make it a pinned hub id.
    """
    folder = (root / config.path).resolve()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise GeneratorError(f"{folder}: no model_index.json, so it is no diffusers pipeline (generator.path)")
        return folder
    if config.revision is None:
        raise GeneratorError(
            f"generator.path {config.path!r}: there is no folder {folder}. Give an existing folder, "
            "or a hub id together with generator.revision, the commit of its weights"
        )
    return config.path
