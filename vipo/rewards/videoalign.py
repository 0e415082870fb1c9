"""VideoAlign's VideoReward: visual quality, motion quality and text alignment of a clip, by a Qwen2-VL."""

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.reward_options import VideoAlignOptions
from vipo.rewards.ahead import key_of
from vipo.rewards.errors import RewardError
from vipo.rewards.flicker import need_clips
from vipo.rewards.pixels import bicubic, eight_bit, grey_levels, rounded
from vipo.rewards.qwen2_vl import (
    CONFIGURATION,
    TOKENIZER,
    Scorer,
    head_of,
    merged,
    published_texts,
    smart_size,
    vision_of,
    with_prompt,
)
from vipo.rewards.resident import Resident
from vipo.rewards.weights import local_path, located, matching, read_tensors

_DIMENSIONS = ("VQ", "MQ", "TA")
_SPECIAL = tuple(f"<|{name}_reward|>" for name in _DIMENSIONS)
_TEMPLATE = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
# Of a frame, where its configuration does not say; of a clip, frames.
_LEAST_PIXELS, _LEAST_FRAMES, _MOST_FRAMES = 128 * 28 * 28, 4, 768
_KEPT = 4096


class _Shared:
    """One network for all dimensions, and what it has told of the latest samples."""

    def __init__(self, device: str, options: VideoAlignOptions) -> None:
        self._options = options
        patterns = ("model_config.json", "checkpoint-*/*.safetensors", "checkpoint-*/*.pth", "checkpoint-*/*.json")
        self._folder = located("path", options.path, options.revision, patterns)
        settings = _settings(self._folder / "model_config.json")
        self._data, self._norm, self._lora = settings
        self._checkpoint = _newest(self._folder)
        self._files = _files(self._checkpoint)
        whole = self._files[0].name.startswith("model.")
        names = (*CONFIGURATION, *TOKENIZER, *(() if whole else ("model*.safetensors",)))
        self._base = located("base", options.base, options.base_revision, names)
        if not whole:
            # What the adapter was trained on comes first: what was trained overwrites it.
            self._files = [*matching(self._base, ("model*.safetensors",)), *self._files]
        self._instruction = local_path("instruction", options.instruction)
        (self._template,) = published_texts(self._instruction, [_TEMPLATE])
        self._scorer = Scorer(self._base, _SPECIAL, "video")
        self.resident: Resident[nn.ModuleDict] = Resident(self._load, device, options.resident)
        self._told: OrderedDict[bytes, list[float]] = OrderedDict()

    @property
    def weight_files(self) -> list[Path]:
        small = [*CONFIGURATION, *TOKENIZER]
        base = [path for name in small for path in sorted(self._base.glob(name))]
        return [self._folder / "model_config.json", *self._files, *base, self._instruction]

    def scores(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3)``: all dimensions, normalised."""
        found: list[Tensor] = []
        size = self._options.batch
        for start in range(0, len(videos), size):
            part, texts = videos[start : start + size], list(prompts[start : start + size])
            if part.requires_grad:
                found.append(self._scores(part, texts))
                continue
            key = key_of(eight_bit(part), texts)
            if key not in self._told:
                self._told[key] = self._scores(part, texts).flatten().tolist()
                while len(self._told) > _KEPT:
                    self._told.popitem(last=False)
            found.append(torch.tensor(self._told[key], device=videos.device).view(len(part), len(_DIMENSIONS)))
        return torch.cat(found)

    def _scores(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        frames = _chosen(videos.shape[1], self._options.frame_rate, self._data)
        levels = grey_levels(videos[:, frames])
        height, width = smart_size(levels.shape[3], levels.shape[4], _LEAST_PIXELS, self._data["max_frame_pixels"])
        with self.resident as networks:
            seen = [vision_of(rounded(bicubic(clip.float(), height, width))) for clip in levels]
            texts = [with_prompt(self._template, prompt) for prompt in prompts]
            vectors = self._scorer.vectors(networks["network"], seen, texts)
            raw = networks["head"](vectors)
        # Each dimension is read at its own token: by a head of its own where there are three.
        values = raw.diagonal(dim1=1, dim2=2) if raw.shape[2] == len(_DIMENSIONS) else raw[..., 0]
        mean, std = (torch.tensor([pair[i] for pair in self._norm], device=values.device) for i in (0, 1))
        return (values - mean) / std

    def _load(self) -> nn.ModuleDict:
        tensors = read_tensors(self._files)
        rank, alpha, stabilised = self._lora
        whole = merged(tensors, alpha / (math.sqrt(rank) if stabilised else rank), self._checkpoint)
        network = self._scorer.network(whole, self._checkpoint, self._options.dtype)
        width = network.config.text_config.hidden_size
        head = head_of(whole, width, self._checkpoint)
        return nn.ModuleDict({"network": network, "head": head})


class VideoAlign:
    """One dimension of VideoReward, ``(x - mean) / std`` with the constants of its own configuration.

    Two terms of other dimensions, all else equal, share one network, and one pass through it for a sample.

    Source: Liu et al., arXiv 2501.13918, and its public code.

    Args:
        device: where the network computes.
        options: section of the term.
        twin: one whose network it takes over.

    Raises:
        RewardError: weights, configuration or instruction are not found, or are of another kind.
    """

    Options = VideoAlignOptions

    def __init__(self, device: str, options: VideoAlignOptions, twin: "VideoAlign | None" = None) -> None:
        self._own, self._device = options, device
        self._shared: _Shared = _Shared(device, options) if twin is None else twin._shared
        self._place = _DIMENSIONS.index(options.dimension)

    def sharing(self, options: VideoAlignOptions) -> "VideoAlign | None":
        """One with other options on the same network; None where they are of another network."""
        same = self._own.model_copy(update={"dimension": options.dimension}) == options
        return VideoAlign(self._device, options, self) if same else None

    @property
    def resident(self) -> Resident[nn.ModuleDict]:
        """The network."""
        return self._shared.resident

    @property
    def weight_files(self) -> list[Path]:
        """What network, tokenizer and text are read from."""
        return self._shared.weight_files

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores ``(B,)`` float32 of clips ``(B, T, 3, H, W)`` in [0, 1]."""
        need_clips(images)
        return self._shared.scores(images, prompts)[:, self._place]


def _chosen(frames: int, rate: float, data: Mapping[str, Any]) -> list[int]:
    """Frames that are looked at: as many as the configuration says, from the first to the last."""
    if data["num_frames"] is not None:
        count = round(data["num_frames"] / 2) * 2
    else:
        most = min(_MOST_FRAMES, frames) // 2 * 2
        count = round(min(max(frames / rate * data["fps"], _LEAST_FRAMES), most) / 2) * 2
    count = min(count, frames)
    return [int(place) for place in torch.linspace(0, frames - 1, count).round().tolist()]


def _settings(path: Path) -> tuple[dict[str, Any], list[tuple[float, float]], tuple[int, float, bool]]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        data, model, lora = told["data_config"], told["model_config"], told["peft_lora_config"]
        kind = {
            "prompt_template_type": data["prompt_template_type"],
            "sample_type": data.get("sample_type", "uniform"),
            "use_special_tokens": model["use_special_tokens"],
        }
        wanted = {"prompt_template_type": "detailed_special", "sample_type": "uniform", "use_special_tokens": True}
        if other := [f"{key} {kind[key]!r}" for key in wanted if kind[key] != wanted[key]]:
            raise RewardError(f"{path}: {', '.join(other)} is not read here; it takes {wanted}")
        chosen = {
            "max_frame_pixels": int(data["max_frame_pixels"]),
            "num_frames": data.get("num_frames"),
            "fps": float(data["fps"]),
        }
        norm = told.get("inference_config") or {}
        pairs = [(float(norm.get(f"{n}_mean", 0.0)), float(norm.get(f"{n}_std", 1.0))) for n in _DIMENSIONS]
        return chosen, pairs, (int(lora["lora_r"]), float(lora["lora_alpha"]), bool(lora.get("use_rslora", False)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RewardError(f"{path}: is no configuration of VideoAlign ({error!r:.200}); fetch it again") from error


def _newest(folder: Path) -> Path:
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    if not found:
        raise RewardError(f"{folder}: holds no folder checkpoint-N; fetch it again, or name another folder")
    return max(found, key=lambda path: int(path.name.partition("-")[2]))


def _files(checkpoint: Path) -> list[Path]:
    """All of a model, or what was trained of it: its adapter and the other tensors."""
    for names in (("model.safetensors",), ("model.pth",)):
        if (checkpoint / names[0]).is_file():
            return [checkpoint / names[0]]
    rest = matching(checkpoint, ("non_lora_state_dict.safetensors", "non_lora_state_dict.pth"))
    return [*rest, *matching(checkpoint, ("adapter_model.safetensors",))]
