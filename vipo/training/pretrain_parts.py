"""What demo generators have in common: drawn scenes with captions, tokenizers, and what a family says of itself."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from vipo.config.pretrain import PretrainConfig
from vipo.demo import motion, scenes, words
from vipo.sampling.noise import keyed_seed

LOG_EVERY = 50
"""Steps."""


def cosine(step: int, steps: int, warmup: int) -> float:
    """Of the learning rate, at a step: a linear rise over `warmup` steps, then half a cosine down to 0.01."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class ScenePool:
    """Drawn training pictures ``(N, 3, H, W)`` or clips ``(N, 3, T, H, W)``, uint8, and the captions allowed."""

    images: Tensor
    captions: tuple[tuple[str, ...], ...]


class Family(Protocol):
    """What a family of generators is made of, in the smallest size."""

    autoencoder_class: Any
    memory_format: torch.memory_format

    def autoencoder(self) -> Any:
        """A new one, drawn from torch's own generator."""

    def norm(self) -> nn.Module:
        """Running mean and variance of each latent channel."""

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Latents ``(B, C, ...)`` of pixels in [-1, 1], as `latent_layer` gives them."""

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels, of [-1, 1] and beyond: nothing is cut off that could not be learned from."""

    def latent_layer(self, vae: Any) -> Any:
        """The convolution whose first C channels the latents are."""

    def denoiser(self) -> nn.Module:
        """A new transformer with its text encoders, drawn from torch's own generator."""

    def packed(self, latents: Tensor) -> Tensor:
        """Latents as the transformer takes them."""

    def velocity(self, denoiser: nn.Module, latents: Tensor, sigma: Tensor, texts: Sequence[str]) -> Tensor:
        """The prediction for noisy latents ``(B, C, ...)`` at noise levels ``(B,)``, as `packed` orders it."""

    def pipeline(self, vae: Any, denoiser: Any) -> Any:
        """The stock pipeline."""


def build_pool(config: PretrainConfig) -> ScenePool:
    """Draw the training scenes; captions (of words: words) that are held out never appear."""
    rng = np.random.default_rng(keyed_seed(config.seed, "scenes"))
    drawn = {"shapes": _drawn_shapes, "words": _drawn_words, "motion": _drawn_clips}[config.drawn](rng, config)
    images, captions = zip(*itertools.islice(drawn, config.scenes), strict=True)
    return ScenePool(torch.from_numpy(np.stack(images)), captions)


_Drawn = Iterator[tuple[NDArray[np.uint8], tuple[str, ...]]]


def _drawn_shapes(rng: np.random.Generator, config: PretrainConfig) -> _Drawn:
    options = [scenes.CaptionParts(*flags) for flags in itertools.product((True, False), repeat=3)]
    while True:
        scene = scenes.sample_scene(rng, config.two_objects)
        texts = {scenes.caption(scene, parts) for parts in options}
        allowed = tuple(sorted(text for text in texts if not scenes.is_held_out(text)))
        if allowed:
            yield (scenes.draw(scene) * 255).round().astype(np.uint8), allowed


def _drawn_words(rng: np.random.Generator, _config: PretrainConfig) -> _Drawn:
    font = words.typeface()
    while True:
        item = words.sample_word(rng)
        yield words.draw(item, font), words.captions(item)


def _drawn_clips(rng: np.random.Generator, _config: PretrainConfig) -> _Drawn:
    while True:
        item = motion.sample_clip(rng)
        allowed = tuple(text for text in motion.captions(item) if not scenes.is_held_out(text))
        if allowed:
            yield (motion.draw(item) * 255).round().astype(np.uint8), allowed


def vocabulary(pool: ScenePool) -> list[str]:
    """Every word of the captions, in order; of words in quotation marks the marks alone, for these are spelled."""
    found = {word for texts in pool.captions for text in texts for word in text.split()}
    return sorted({'"' if '"' in word else word for word in found})


def byte_pair_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that turn each of `words` into one token (Sennrich et al., arXiv 1508.07909).

    The most frequent pair first, ties by the pair itself: the result depends on nothing but the words, which
    the trainer of the tokenizers library does not promise.
    """
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in spelled for pair in itertools.pairwise(pieces)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for pieces in spelled:
            index = 0
            while index + 1 < len(pieces):
                if (pieces[index], pieces[index + 1]) == best:
                    pieces[index : index + 2] = ["".join(best)]
                index += 1
    return merges


def build_tokenizers(config: PretrainConfig, words: list[str]) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Tokenizers whose vocabularies hold every scene word as one token, and letters for all others."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-" + "".join(word for word in words if not word.isalnum())
    words = [word for word in words if word.isalnum()]
    merges = byte_pair_merges(words)
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [first + second for first, second in merges]
    clip = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=config.max_sequence_length,
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -1.0) for word in words] + [(letter, -5.0) for letter in letters]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=config.max_sequence_length)
    return clip, t5


def t5_settings(config: PretrainConfig, vocabulary_size: int) -> Mapping[str, Any]:
    """Of a small T5-like text encoder."""
    width = config.text_width
    return {
        "vocab_size": vocabulary_size,
        "d_model": width,
        "d_kv": 32,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": width // 32,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
