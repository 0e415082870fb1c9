"""DINOv2 weights in the layout of the transformers library, under the names that timm reads."""

import re
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

MODEL_TYPES = ("dinov2", "dinov2_with_registers")

_SIZES: Mapping[int, str] = MappingProxyType({384: "small", 768: "base", 1024: "large", 1536: "giant"})
_NAMES = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"attention\.(attention\.)?(query|q_proj)\b", "attn.q"),
    (r"attention\.(attention\.)?(key|k_proj)\b", "attn.k"),
    (r"attention\.(attention\.)?(value|v_proj)\b", "attn.v"),
    (r"attention\.(output\.dense|o_proj)\b", "attn.proj"),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in", "mlp.w12"),
    (r"mlp\.weights_out", "mlp.w3"),
)


def timm_architecture(config: Mapping[str, object]) -> str | None:
    """The timm name of a transformers DINOv2 `config.json`; None where it is of another model."""
    size = _SIZES.get(config["hidden_size"]) if isinstance(config.get("hidden_size"), int) else None  # type: ignore[call-overload]
    if config.get("model_type") not in MODEL_TYPES or size is None:
        return None
    registers = "_reg4" if config["model_type"] == "dinov2_with_registers" else ""
    return f"vit_{size}_patch14{registers}_dinov2.lvd142m"


def published_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformers DINOv2 under the names of the published checkpoints, which timm converts itself.

    A tensor that no rule knows keeps its name, so that the strict loading refuses it.
    """
    renamed = {}
    for key, value in weights.items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [key for key in renamed if re.search(r"attn\.q\.", key)]:
        parts = [renamed.pop(key.replace("attn.q.", f"attn.{part}."), None) for part in "qkv"]
        renamed[key.replace("attn.q.", "attn.qkv.")] = torch.cat([part for part in parts if part is not None])
    # Its presence is how timm tells a published checkpoint from one of its own; it is never part of the model.
    renamed.setdefault("mask_token", torch.zeros(0))
    return renamed
