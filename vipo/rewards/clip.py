"""CLIP as published rewards use it: pictures and texts to unit vectors, in one network, batched and frozen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.config.reward_options import ModelOptions, OtherTokenizerOptions
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import clip_pixels, need_pictures
from vipo.rewards.resident import Resident
from vipo.rewards.weights import WEIGHTS, filled, located, matching, read_tensors

CONFIGURATION = ("config.json",)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.*", "merges.txt")


class OnClip:
    """What all rewards on CLIP share: the network, and pictures and texts as unit vectors.

    Args:
        device: where the network computes.
        options: the reward's own.

    Raises:
        RewardError: weights or tokenizer are not found.
    """

    def __init__(self, device: str, options: ModelOptions) -> None:
        self._batch, self._dtype = options.batch, options.dtype
        self._place = self._find(options)
        self._tokenizer_place = folder_of(self._place)
        if isinstance(options, OtherTokenizerOptions):
            self._tokenizer_place = located("tokenizer", options.tokenizer, options.tokenizer_revision, TOKENIZER)
        self._tokenizer: Any = None
        self.resident: Resident[Any] = Resident(self._load, device, options.resident)

    @property
    def weight_files(self) -> list[Path]:
        """What the network and the tokenizer are read from."""
        return [
            *matching(folder_of(self._place), CONFIGURATION),
            *matching(self._place, WEIGHTS),
            *self._tokenizer_files(),
        ]

    def embed(self, network: Any, images: Tensor) -> Tensor:
        """Unit vectors ``(B, d)`` float32 of pictures ``(B, 3, H, W)`` in [0, 1]."""
        size = network.config.vision_config.image_size
        pixels = self._pixels(images, size).to(network.dtype)
        with torch.autocast(images.device.type, enabled=False):
            features = network.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(features.float(), dim=1)

    def embed_texts(self, network: Any, prompts: Sequence[str]) -> Tensor:
        """Unit vectors ``(B, d)`` float32 of texts, cut to what the network takes."""
        if self._tokenizer is None:
            from transformers import CLIPTokenizer

            names = {path.name for path in self._tokenizer_files()}
            # Of an empty folder, transformers makes a tokenizer that knows no word.
            if not ({"tokenizer.json"} <= names or {"vocab.json", "merges.txt"} <= names):
                raise RewardError(
                    f"{self._tokenizer_place}: holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)"
                )
            self._tokenizer = CLIPTokenizer.from_pretrained(self._tokenizer_place)
        # What follows the end of a text changes nothing: attention is causal and the text is read there.
        tokens = self._tokenizer(
            [self._text(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        with torch.no_grad(), torch.autocast(network.device.type, enabled=False):
            ids = tokens.input_ids.to(network.device)
            features = network.get_text_features(input_ids=ids).pooler_output
        return F.normalize(features.float(), dim=1)

    def _pixels(self, images: Tensor, size: int) -> Tensor:
        return clip_pixels(images, size, nearest=True)

    def _text(self, prompt: str) -> str:
        return prompt

    def _find(self, options: ModelOptions) -> Path:
        return located_clip(options)

    def _tokenizer_files(self) -> list[Path]:
        return [path for name in TOKENIZER for path in sorted(self._tokenizer_place.glob(name))]

    def _load(self) -> Any:
        return clip_network(self._place, self._dtype)


class ClipReward(OnClip):
    """A cosine of picture and text; each reward says how pictures are prepared and what the cosine becomes.

    Calling it keeps the gradient to the pictures; `vipo.rewards.score` takes none.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores ``(B,)`` float32 of pictures ``(B, 3, H, W)`` in [0, 1]."""
        need_pictures(images)
        with self.resident as network:
            # The samples of a group share their text.
            unique = list(dict.fromkeys(prompts))
            vectors = torch.cat([self.embed_texts(network, part) for part in _parts(unique, self._batch)])
            texts = vectors[[unique.index(prompt) for prompt in prompts]]
            pictures = torch.cat([self.embed(network, part) for part in images.split(self._batch)])
            return self._scored((pictures * texts).sum(dim=1), network)

    def _scored(self, cosine: Tensor, network: Any) -> Tensor:
        return cosine


def located_clip(options: ModelOptions) -> Path:
    """Where a checkpoint of transformers' CLIPModel is; of a hub repository ``.bin`` is fetched for want of better."""
    small = (*CONFIGURATION, *TOKENIZER)
    place = located("path", options.path, options.revision, (*small, WEIGHTS[0]))
    if place.is_dir() and not any(place.glob(WEIGHTS[0])):
        place = located("path", options.path, options.revision, (*small, WEIGHTS[1]))
    return place


def clip_network(place: Path, dtype: str) -> Any:
    """The CLIPModel of a folder in transformers' layout, or of a weights file in one."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_pretrained(matching(folder_of(place), CONFIGURATION)[0].parent)
    return filled(CLIPModel, config, read_tensors(matching(place, WEIGHTS)), place, dtype)


def folder_of(place: Path) -> Path:
    """Where the other files of a checkpoint are that is named by its folder or its weights."""
    return place if place.is_dir() else place.parent


def _parts(values: Sequence[str], size: int) -> list[Sequence[str]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
