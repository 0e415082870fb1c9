"""HPSv3: what people prefer, by a Qwen2-VL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.reward_options import HPSv3Options
from vipo.rewards.pixels import grey_levels, need_pictures, pil_bicubic
from vipo.rewards.qwen2_vl import (
    CONFIGURATION,
    TOKENIZER,
    Scorer,
    head_of,
    published_texts,
    smart_size,
    vision_of,
    with_prompt,
)
from vipo.rewards.resident import Resident
from vipo.rewards.weights import local_path, located, matching, read_tensors

_WEIGHTS = ("HPSv3.safetensors",)
_TEXTS = ("INSTRUCTION", "prompt_with_special_token")
_PIXELS = 256 * 28 * 28


class HPSv3:
    """The first of the head's two numbers, a mean, of which the second is the spread; about 0 to 15.

    Calling it keeps the gradient to the pictures; `vipo.rewards.score` takes none.

    Source: Ma et al., arXiv 2508.03789, and the package hpsv3 1.0.

    Args:
        device: where the network computes.
        options: section of the term.

    Raises:
        RewardError: weights, tokenizer or instruction are not found.
    """

    Options = HPSv3Options

    def __init__(self, device: str, options: HPSv3Options) -> None:
        self._batch, self._dtype = options.batch, options.dtype
        self._weights = matching(located("path", options.path, options.revision, _WEIGHTS), _WEIGHTS)
        self._base = located("base", options.base, options.base_revision, (*CONFIGURATION, *TOKENIZER))
        self._instruction = local_path("instruction", options.instruction)
        self._template = "".join(published_texts(self._instruction, _TEXTS))
        self._scorer = Scorer(self._base, ["<|Reward|>"], "image")
        self.resident: Resident[nn.ModuleDict] = Resident(self._load, device, options.resident)

    @property
    def weight_files(self) -> list[Path]:
        """What network, tokenizer and text are read from."""
        base = [path for name in (*CONFIGURATION, *TOKENIZER) for path in sorted(self._base.glob(name))]
        return [*self._weights, *base, self._instruction]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores ``(B,)`` float32 of pictures ``(B, 3, H, W)`` in [0, 1]."""
        need_pictures(images)
        size = smart_size(images.shape[2], images.shape[3], _PIXELS, _PIXELS)
        with self.resident as networks:
            found = []
            for start in range(0, len(images), self._batch):
                part = slice(start, start + self._batch)
                levels = pil_bicubic(grey_levels(images[part]), *size)
                texts = [with_prompt(self._template, prompt) for prompt in prompts[part]]
                seen = [vision_of(picture[None]) for picture in levels]
                vectors = self._scorer.vectors(networks["network"], seen, texts)
                found.append(networks["head"](vectors)[:, 0, 0])
            return torch.cat(found)

    def _load(self) -> nn.ModuleDict:
        tensors = read_tensors(self._weights)
        network = self._scorer.network(tensors, self._weights[0], self._dtype)
        head = head_of(tensors, network.config.text_config.hidden_size, self._weights[0])
        return nn.ModuleDict({"network": network, "head": head})
