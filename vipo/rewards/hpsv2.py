"""HPSv2.1: what people prefer, the reward of the paper's image experiments."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.config.reward_options import HPSv2Options, ModelOptions
from vipo.rewards.clip import ClipReward
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import padded_pixels
from vipo.rewards.weights import filled, layers, located, matching, read_tensors

_FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt")
# Of open_clip's ViT-H-14, the one network of HPSv2: its tensors tell all but how they are cut into heads.
_VISION_HEAD, _TEXT_HEAD = 80, 64


class HPSv2(ClipReward):
    """Cosine of picture and text, [-1, 1]; about 0.15 to 0.4, and tables show it as it is or times 100.

    The checkpoint is open_clip's, and so is the cleaning of texts.

    Source: Wu et al., arXiv 2306.09341, and the package hpsv2 1.2.0 under current torchvision, whose resize of tensors
    is antialiased (before 0.17 it was not, and scores differ).
    """

    Options = HPSv2Options

    @property
    def weight_files(self) -> list[Path]:
        """What the network and the tokenizer are read from."""
        return [*matching(self._place, _FILES), *self._tokenizer_files()]

    def _pixels(self, images: Tensor, size: int) -> Tensor:
        return padded_pixels(images, size)

    def _text(self, prompt: str) -> str:
        import ftfy

        return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()

    def _find(self, options: ModelOptions) -> Path:
        return located("path", options.path, options.revision, _FILES[1:])

    def _load(self) -> Any:
        from transformers import CLIPModel

        (file,) = matching(self._place, _FILES)
        tensors = read_tensors([file])
        try:
            config, named = open_clip_config(tensors), open_clip_names(tensors)
        except (KeyError, IndexError, ValueError) as error:
            raise RewardError(f"{file}: is no checkpoint of open_clip's ViT-H-14 ({error}); name another") from error
        return filled(CLIPModel, config, named, file, self._dtype)


def open_clip_config(tensors: Mapping[str, Tensor]) -> Any:
    """The configuration that a checkpoint of open_clip's ViT-H-14, or of a smaller one of its kind, has."""
    from transformers import CLIPConfig

    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    return CLIPConfig(
        projection_dim=tensors["text_projection"].shape[1],
        vision_config={
            "hidden_size": width,
            "intermediate_size": len(tensors["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": layers("visual.transformer.resblocks.", tensors),
            "num_attention_heads": width // _VISION_HEAD,
            "image_size": side * patch,
            "patch_size": patch,
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": layers("transformer.resblocks.", tensors),
            "num_attention_heads": text_width // _TEXT_HEAD,
            "max_position_embeddings": len(tensors["positional_embedding"]),
            "hidden_act": "gelu",
            # The last one of the vocabulary: open_clip reads a text where its largest token is.
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
            "pad_token_id": 0,
        },
    )


_OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def open_clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an open_clip checkpoint under the names of transformers' CLIPModel."""
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in _OUTER:
            named[_OUTER[name]] = value
        elif name in _PROJECTIONS:
            named[_PROJECTIONS[name]] = value.T.contiguous()
        else:
            outer, _, rest = name.partition("transformer.resblocks.")
            number, _, inner = rest.partition(".")
            tower = "vision_model" if outer == "visual." else "text_model"
            layer = f"{tower}.encoder.layers.{number}"
            module, _, kind = inner.rpartition(".")
            if module == "attn" and kind.startswith("in_proj_"):
                for part, third in zip("qkv", torch.chunk(value, 3), strict=True):
                    named[f"{layer}.self_attn.{part}_proj.{kind.removeprefix('in_proj_')}"] = third.clone()
            else:
                named[f"{layer}.{_INNER[module]}.{kind}"] = value
    return named
