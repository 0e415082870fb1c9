"""Names of networks that diffusers has no converter of, as its conversion scripts and ComfyUI's loader have them.

Told from the other end than ``vipo.handover`` tells it: original names to those of diffusers, and to ComfyUI's.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_ONCE = {
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "byt5_in.layernorm": "context_embedder_2.norm",
    **{f"byt5_in.fc{number}": f"context_embedder_2.linear_{number}" for number in (1, 2, 3)},
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "img_in.proj": "x_embedder.proj",
    "cond_type_embedding": "cond_type_embed",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_IN_A_BLOCK = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    **{f"img_attn_{letter}": f"attn.to_{letter}" for letter in "qkv"},
    **{f"txt_attn_{letter}": f"attn.add_{letter}_proj" for letter in "qkv"},
    **{f"img_attn_{letter}_norm": f"attn.norm_{letter}" for letter in "qk"},
    **{f"txt_attn_{letter}_norm": f"attn.norm_added_{letter}" for letter in "qk"},
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
_IN_A_REFINER = {
    **{f"self_attn_{letter}": f"attn.to_{letter}" for letter in "qkv"},
    "self_attn_proj": "attn.to_out.0",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}

# ComfyUI's name for what the original's file holds, in the order in which its loader replaces.
_COMFYUI_REPLACES = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    ("_attn_proj.", "_attn.proj."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)


def hunyuan_layers(blocks: int, refiners: int) -> dict[str, str]:
    """Layers of HunyuanVideo 1.5 in the authors' file, and their names in diffusers."""
    found = dict(_ONCE)
    for number in range(blocks):
        inside = _IN_A_BLOCK.items()
        found |= {f"double_blocks.{number}.{theirs}": f"transformer_blocks.{number}.{ours}" for theirs, ours in inside}
    for number in range(refiners):
        before = (
            f"txt_in.individual_token_refiner.blocks.{number}",
            f"context_embedder.token_refiner.refiner_blocks.{number}",
        )
        found |= {f"{before[0]}.{theirs}": f"{before[1]}.{ours}" for theirs, ours in _IN_A_REFINER.items()}
    return found


def hunyuan_in_comfyui(state: Mapping[str, Tensor], layers: Mapping[str, str]) -> dict[str, Tensor]:
    """A network of diffusers, by way of the authors' file, as ComfyUI's takes it: with q, k and v joined."""
    original = {}
    for theirs, ours in layers.items():
        for kind in ("weight", "bias"):
            if (value := state.get(f"{ours}.{kind}")) is not None:
                # The converter exchanges the halves of this one alone.
                turned = theirs == "final_layer.adaLN_modulation.1"
                original[f"{theirs}.{kind}"] = torch.cat(value.chunk(2)[::-1]) if turned else value
    for name in list(original):
        if match := re.fullmatch(r"(.+_attn)_q\.(weight|bias)", name):
            parts = [original.pop(f"{match[1]}_{letter}.{match[2]}") for letter in "qkv"]
            original[f"{match[1]}_qkv.{match[2]}"] = torch.cat(parts)
    found = {}
    for name, value in original.items():
        for before, after in _COMFYUI_REPLACES:
            name = name.replace(before, after)
        found[name] = value
    return found


def cogvideox_from_comfyui(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's CogVideoX under diffusers' names."""
    inside = {
        **{letter: f"attn1.to_{letter}" for letter in "qkv"},
        **{f"norm_{letter}": f"attn1.norm_{letter}" for letter in "qk"},
        "attn_out": "attn1.to_out.0",
        "ff_proj": "ff.net.0.proj",
        "ff_out": "ff.net.2",
    }
    found = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", layer):
            layer = f"transformer_blocks.{match[1]}.{inside.get(match[2], match[2])}"
        found[f"{layer.replace('time_embedding_linear', 'time_embedding.linear')}.{kind}"] = value
    return found
