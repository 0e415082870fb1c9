"""ImageReward: what people prefer, by a BLIP that reads text and picture together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.reward_options import ImageRewardOptions
from vipo.rewards.errors import RewardError
from vipo.rewards.linear_head import linear_head
from vipo.rewards.pixels import clip_pixels, need_pictures
from vipo.rewards.resident import Resident
from vipo.rewards.weights import DTYPES, below, fill, filled, layers, located, matching, read_tensors

_FILES = ("ImageReward.safetensors", "ImageReward.pt")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
# Of the published package, for its checkpoint.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_LONGEST_TEXT = 35
# Of both of BLIP's networks: their tensors tell all but how they are cut into heads.
_HEAD = 64


class ImageReward:
    """``(head(h) - mean) / std``, about -2.5 to 2.5, with h the text encoder's first vector, which attends the picture.

    Calling it keeps the gradient to the pictures; `vipo.rewards.score` takes none.

    Source: Xu et al., arXiv 2304.05977, and the package image-reward 1.5.

    Args:
        device: where the network computes.
        options: section of the term.

    Raises:
        RewardError: weights or tokenizer are not found.
    """

    Options = ImageRewardOptions

    def __init__(self, device: str, options: ImageRewardOptions) -> None:
        self._batch, self._dtype = options.batch, options.dtype
        place = located("path", options.path, options.revision, _FILES[1:])
        (self._weights,) = matching(place, _FILES)
        self._tokenizer_place = located("tokenizer", options.tokenizer, options.tokenizer_revision, _TOKENIZER)
        self._tokenizer: Any = None
        self.resident: Resident[nn.ModuleDict] = Resident(self._load, device, options.resident)

    @property
    def weight_files(self) -> list[Path]:
        """What the networks and the tokenizer are read from."""
        return [self._weights, *(path for name in _TOKENIZER for path in sorted(self._tokenizer_place.glob(name)))]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores ``(B,)`` float32 of pictures ``(B, 3, H, W)`` in [0, 1]."""
        need_pictures(images)
        with self.resident as networks:
            starts = range(0, len(images), self._batch)
            parts = [slice(start, start + self._batch) for start in starts]
            return torch.cat([self._scores(networks, images[part], prompts[part]) for part in parts])

    def _scores(self, networks: nn.ModuleDict, images: Tensor, prompts: Sequence[str]) -> Tensor:
        vision: Any = networks["vision"]
        tokens = self._tokens(prompts).to(images.device)
        pixels = clip_pixels(images, vision.patch_embed.img_size[0], nearest=True).to(DTYPES[self._dtype])
        with torch.autocast(images.device.type, enabled=False):
            seen = vision.forward_features(pixels)
            read = networks["text"](
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=images.device),
                is_decoder=False,
            )
            scores: Tensor = networks["head"](read.last_hidden_state[:, 0].float()).squeeze(1)
        return (scores - _MEAN) / _STD

    def _tokens(self, prompts: Sequence[str]) -> Any:
        if self._tokenizer is None:
            from transformers import BertTokenizer

            if not any((self._tokenizer_place / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
                raise RewardError(f"{self._tokenizer_place}: holds no tokenizer (tokenizer.json or vocab.txt)")
            self._tokenizer = BertTokenizer.from_pretrained(self._tokenizer_place)
            self._tokenizer.add_special_tokens({"bos_token": "[DEC]"})
            self._tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_LONGEST_TEXT, return_tensors="pt"
        )

    def _load(self) -> nn.ModuleDict:
        tensors = read_tensors([self._weights])
        try:
            networks = {
                "vision": self._vision(below("blip.visual_encoder.", tensors)),
                "text": self._text(below("blip.text_encoder.", tensors)),
            }
        except (KeyError, ValueError, IndexError) as error:
            raise RewardError(f"{self._weights}: is no checkpoint of ImageReward ({error}); name another") from error
        networks["head"] = linear_head(below("mlp.", tensors), self._weights)
        return nn.ModuleDict(networks)

    def _vision(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
        network = VisionTransformer(
            img_size=side * patch,
            patch_size=patch,
            embed_dim=width,
            depth=layers("blocks.", tensors),
            num_heads=width // _HEAD,
            mlp_ratio=len(tensors["blocks.0.mlp.fc1.bias"]) / width,
            num_classes=0,
            weight_init="skip",
        )
        return fill(network, tensors, self._weights, self._dtype)

    def _text(self, tensors: Mapping[str, Tensor]) -> Any:
        from transformers import BlipTextConfig, BlipTextModel

        vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
        config = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=layers("encoder.layer.", tensors),
            num_attention_heads=width // _HEAD,
            max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
            pad_token_id=0,
        )
        # Positions are no weights.
        kept = {name: value for name, value in tensors.items() if value.is_floating_point()}
        return filled(BlipTextModel, config, kept, self._weights, self._dtype, add_pooling_layer=False)
