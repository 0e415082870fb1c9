"""What a demo generator is made of: drawn pictures with captions, tokenizers, and the network that is trained."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from vipo.config.pretrain import PretrainConfig
from vipo.demo import scenes, words
from vipo.sampling.noise import keyed_seed


@dataclass(frozen=True)
class ScenePool:
    """Drawn training pictures ``(N, 3, H, W)`` uint8 and the allowed captions of each."""

    images: Tensor
    captions: tuple[tuple[str, ...], ...]


def build_pool(config: PretrainConfig) -> ScenePool:
    """Draw the training pictures; captions (of words: words) that are held out never appear."""
    rng = np.random.default_rng(keyed_seed(config.seed, "scenes"))
    drawn = {"shapes": _drawn_shapes, "words": _drawn_words}[config.drawn](rng, config)
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
    pieces += [(f"▁{word}", -1.0) for word in words if word != "▁"] + [(letter, -5.0) for letter in letters]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=config.max_sequence_length)
    return clip, t5


class Denoiser(nn.Module):
    """The transformer with its two text encoders, as the stock pipeline calls them."""

    def __init__(self, config: PretrainConfig, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
        super().__init__()
        width = config.text_width
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=1,
                num_attention_heads=width // 32,
                max_position_embeddings=config.max_sequence_length,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=width,
                d_kv=32,
                d_ff=2 * width,
                num_layers=2,
                num_heads=width // 32,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        head = config.head_width
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * config.latent_channels,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=head,
            num_attention_heads=config.heads,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=False,
            axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
        )

    def forward(self, packed: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor, grid: Tensor) -> Tensor:
        pooled = self.text_encoder(clip_ids).pooler_output
        sequence = self.text_encoder_2(t5_ids)[0]
        velocity: Tensor = self.transformer(
            hidden_states=packed,
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=sequence,
            txt_ids=torch.zeros(sequence.shape[1], 3),
            img_ids=grid,
            return_dict=False,
        )[0]
        return velocity
