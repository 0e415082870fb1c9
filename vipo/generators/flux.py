"""FLUX-class generators (`FluxTransformer2DModel`): packed latents, embedded guidance, sigma as time."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import hf_hub_download
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from vipo.config.models import GeneratorConfig, LoraConfig
from vipo.generators.base import Conditioning, Generator, GeneratorError, checkpoint_location
from vipo.sampling.noise import keyed_seed

_AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}

T = TypeVar("T")


def pack_latents(latents: Tensor) -> Tensor:
    """``(B, C, H, W)`` to tokens ``(B, H/2 * W/2, 4 C)``: row-major 2x2 patches, features in (c, 2, 2) order."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents`, to ``(B, C, height, width)`` in latent pixels."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, features // 4, height, width)


def image_ids(height: int, width: int, device: torch.device | str) -> Tensor:
    """Rotary position ids of the tokens of a ``height x width`` latent: ``(H/2 * W/2, 3)`` float32."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    grid = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


class FluxGenerator(Generator):
    """FLUX.1 and the demo generator."""

    network: Any
    network_folder: ClassVar[str] = "transformer"

    def __init__(self, config: GeneratorConfig, network: FluxTransformer2DModel, vae: Any) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.network = network.to(self.device).requires_grad_(False).eval()
        self.vae = vae.to(self.device).requires_grad_(False).eval()
        self._guided = bool(network.config.guidance_embeds)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        for key in ("height", "width"):
            if getattr(config, key) % (2 * scale):
                raise GeneratorError(
                    f"generator.{key} {getattr(config, key)} is not a multiple of {2 * scale} (autoencoder x packing)"
                )
        self.latent_shape = (network.config.in_channels // 4, config.height // scale, config.width // scale)
        self._image_ids = image_ids(self.latent_shape[1], self.latent_shape[2], self.device)

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> "FluxGenerator":
        location = checkpoint_location(config, root)
        index = _model_index(location, config.revision)
        name = index.get("vae", [None, None])[1]
        if name not in _AUTOENCODERS:
            raise GeneratorError(
                f"{location}/model_index.json: vae class {name!r} is not one of {', '.join(_AUTOENCODERS)}"
            )
        network = _load(FluxTransformer2DModel.from_pretrained, location, "transformer", config)
        return cls(config, network, _load(_AUTOENCODERS[name].from_pretrained, location, "vae", config))

    @classmethod
    @torch.no_grad()
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        location = checkpoint_location(config, root)
        device = torch.device(config.device)
        clip_tokenizer = _load(CLIPTokenizer.from_pretrained, location, "tokenizer", config, weights=False)
        t5_tokenizer = _load(T5TokenizerFast.from_pretrained, location, "tokenizer_2", config, weights=False)
        for part, tokenizer in (("tokenizer", clip_tokenizer), ("tokenizer_2", t5_tokenizer)):
            # transformers makes an empty tokenizer of a folder without a vocabulary: all prompts would read alike.
            if tokenizer("a").input_ids == tokenizer("b").input_ids:
                raise GeneratorError(
                    f"{location}/{part}: has no vocabulary (tokenizer.json, or the files it stands for); "
                    "copy or download generator.path again"
                )
        clip = _load(CLIPTextModel.from_pretrained, location, "text_encoder", config).to(device).eval()
        t5 = _load(T5EncoderModel.from_pretrained, location, "text_encoder_2", config).to(device).eval()
        encoded = []
        for text in texts:
            padded: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            clip_ids = clip_tokenizer(text, max_length=clip_tokenizer.model_max_length, **padded).input_ids
            t5_ids = t5_tokenizer(text, max_length=config.max_sequence_length, **padded).input_ids
            encoded.append(
                {
                    "pooled_projections": clip(clip_ids.to(device)).pooler_output[0].float().cpu(),
                    "encoder_hidden_states": t5(t5_ids.to(device))[0][0].float().cpu(),
                }
            )
        return encoded

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        sequence = conditioning["encoder_hidden_states"]
        guidance = None
        if self._guided:
            guidance = torch.full((len(latents),), self.config.guidance_scale, device=latents.device)
        tokens = self.network(
            hidden_states=pack_latents(latents),
            timestep=time,
            guidance=guidance,
            pooled_projections=conditioning["pooled_projections"],
            encoder_hidden_states=sequence,
            txt_ids=torch.zeros(sequence.shape[1], 3, device=latents.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return unpack_latents(tokens, self.latent_shape[1], self.latent_shape[2])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        decoded = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0), return_dict=False)[
            0
        ]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

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

    def save_network(self, folder: Path) -> None:
        if getattr(self.network, "peft_config", None):
            # Loaders take alpha for the rank unless metadata says otherwise, and metadata is written in random order:
            # with the scale in B, every loader has the trained policy and the file has the same bytes each time.
            (adapter,) = self.network.peft_config.values()
            scale = adapter.lora_alpha / adapter.r
            layers = {
                name: value * scale if ".lora_B." in name else value
                for name, value in get_peft_model_state_dict(self.network).items()
            }
            FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        else:
            self.network.save_pretrained(folder / self.network_folder, safe_serialization=True)

    def load_network(self, folder: Path) -> None:
        try:
            if getattr(self.network, "peft_config", None):
                self.network.unload_lora()
            if (folder / "pytorch_lora_weights.safetensors").is_file():
                self.network.load_lora_adapter(folder, prefix="transformer", use_safetensors=True)
            else:
                loaded = FluxTransformer2DModel.from_pretrained(
                    folder, subfolder=self.network_folder, use_safetensors=True
                )
                self.network = loaded.to(self.device).requires_grad_(False).eval()
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise GeneratorError(f"{folder}: trained weights cannot be loaded: {error}") from error


def _model_index(location: Path | str, revision: str | None) -> dict[str, Any]:
    try:
        path = (
            location / "model_index.json"
            if isinstance(location, Path)
            else Path(hf_hub_download(location, "model_index.json", revision=revision))
        )
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GeneratorError(f"{location}: model_index.json cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise GeneratorError(f"{location}: model_index.json holds no mapping")
    return index


def _load(
    loader: Callable[..., T], location: Path | str, part: str, config: GeneratorConfig, *, weights: bool = True
) -> T:
    # Weights only from safetensors and in fp32: AdamW on bf16 weights rounds small updates away.
    options = {"use_safetensors": True, "torch_dtype": torch.float32} if weights else {}
    try:
        return loader(location, subfolder=part, revision=config.revision, **options)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise GeneratorError(
            f"{location}/{part}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}); "
            "if a file is missing or damaged, copy or download generator.path again"
        ) from error
