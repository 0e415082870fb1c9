"""Names of each family's layers that ComfyUI knows: the original repository's, or where it renames these, its own.

One function a family, of the network's configuration. What these give back through diffusers' converter, or through the
published maps where it has none, is the network again, every tensor of it: ``tests/unit/test_original_names.py``.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from vipo.generators.original import Rule, joined
from vipo.generators.original_flux import flux, flux2, last_layer
from vipo.generators.original_videos import cogvideox, hunyuan_video, ltx2, wan

Rules = Callable[[Any], list[Rule]]


def _sd3(config: Any) -> list[Rule]:
    """Stable Diffusion 3 and 3.5 (Stability AI's)."""
    block = r"transformer_blocks\.(\d+)\."
    last = rf"transformer_blocks\.({config.num_layers - 1})\."
    x, context = r"joint_blocks.\1.x_block.", r"joint_blocks.\1.context_block."
    return [
        Rule(r"pos_embed\.pos_embed", "pos_embed"),
        Rule(r"pos_embed\.proj", "x_embedder.proj"),
        *(
            Rule(rf"time_text_embed\.{ours}_embedder\.linear_{number}", f"{theirs}_embedder.mlp.{place}")
            for ours, theirs in (("timestep", "t"), ("text", "y"))
            for number, place in ((1, 0), (2, 2))
        ),
        Rule("context_embedder", "context_embedder"),
        *joined(block + r"attn\.", ("to_q", "to_k", "to_v"), x + "attn.qkv"),
        *joined(block + r"attn\.add_", ("q_proj", "k_proj", "v_proj"), context + "attn.qkv"),
        *joined(block + r"attn2\.", ("to_q", "to_k", "to_v"), x + "attn2.qkv"),
        *(
            Rule(rf"{block}{ours}_{letter}", f"{theirs}.ln_{letter}")
            for ours, theirs in (
                (r"attn\.norm", x + "attn"),
                (r"attn2\.norm", x + "attn2"),
                (r"attn\.norm_added", context + "attn"),
            )
            for letter in "qk"
        ),
        Rule(block + r"attn\.to_out\.0", x + "attn.proj"),
        Rule(block + r"attn2\.to_out\.0", x + "attn2.proj"),
        Rule(block + r"attn\.to_add_out", context + "attn.proj"),
        Rule(block + r"norm1\.linear", x + "adaLN_modulation.1"),
        # The last block only scales and shifts its text.
        Rule(last + r"norm1_context\.linear", context + "adaLN_modulation.1", turned=True),
        Rule(block + r"norm1_context\.linear", context + "adaLN_modulation.1"),
        *(
            Rule(rf"{block}{ours}\.net\.{place}", f"{theirs}mlp.fc{number}")
            for ours, theirs in (("ff", x), ("ff_context", context))
            for place, number in ((r"0\.proj", 1), ("2", 2))
        ),
        *last_layer(),
    ]


def _z_image(config: Any) -> list[Rule]:
    """Z-Image (Tongyi's)."""
    return [
        *joined(r"(.+\.attention)\.", ("to_q", "to_k", "to_v"), r"\1.qkv"),
        Rule(r"(.+\.attention)\.to_out\.0", r"\1.out"),
        Rule(r"(.+\.attention)\.norm_([qk])", r"\1.\2_norm"),
        Rule(r"all_(final_layer|x_embedder)\.2-1(.*)", r"\1\2"),
        Rule(r"(.+)", r"\1"),
    ]


def _sana(config: Any) -> list[Rule]:
    """Sana (NVlabs'), with the norms of queries and keys that 1.5 has."""
    block, theirs = r"transformer_blocks\.(\d+)\.", r"blocks.\1."
    return [
        *joined(block + r"attn1\.", ("to_q", "to_k", "to_v"), theirs + "attn.qkv"),
        *joined(block + r"attn2\.", ("to_k", "to_v"), theirs + "cross_attn.kv_linear"),
        Rule(block + r"attn2\.to_q", theirs + "cross_attn.q_linear"),
        *(
            Rule(rf"{block}{ours}\.{layer}", f"{theirs}{name}.{short}")
            for ours, name in (("attn1", "attn"), ("attn2", "cross_attn"))
            for layer, short in ((r"to_out\.0", "proj"), ("norm_q", "q_norm"), ("norm_k", "k_norm"))
        ),
        Rule(block + r"ff\.conv_(\w+)", theirs + r"mlp.\2_conv.conv"),
        Rule(block + "scale_shift_table", theirs + "scale_shift_table"),
        Rule("scale_shift_table", "final_layer.scale_shift_table"),
        Rule("proj_out", "final_layer.linear"),
        Rule(r"patch_embed\.proj", "x_embedder.proj"),
        Rule(r"time_embed\.linear", "t_block.1"),
        *(
            Rule(rf"time_embed\.emb\.timestep_embedder\.linear_{number}", f"t_embedder.mlp.{place}")
            for number, place in ((1, 0), (2, 2))
        ),
        Rule(r"caption_projection\.linear_(\d)", r"y_embedder.y_proj.fc\1"),
        Rule("caption_norm", "attention_y_norm"),
    ]


def _as_here(config: Any) -> list[Rule]:
    """Qwen-Image: diffusers took the original names over."""
    return [Rule(r"(.+)", r"\1")]


def _qwen_image_21(config: Any) -> list[Rule]:
    """Qwen-Image 2.1: as here, but for two layers of each block that ComfyUI has as one."""
    return [
        *joined(r"(transformer_blocks\.\d+\.img_mlp)\.", ("gate_layer", "proj"), r"\1.gate_up"),
        Rule(r"(.+)", r"\1"),
    ]


_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def _unet(config: Any) -> list[Rule]:
    """Stable Diffusion 1.x, 2.x and XL (CompVis' latent-diffusion): blocks are counted through."""
    rules = [
        Rule(rf"{ours}\.linear_{number}", f"{theirs}.{place}")
        for ours, theirs in (("time_embedding", "time_embed"), ("add_embedding", r"label_emb.0"))
        for number, place in ((1, 0), (2, 2))
    ]
    rules += [Rule("conv_in", "input_blocks.0.0"), Rule("conv_norm_out", "out.0"), Rule("conv_out", "out.2")]
    rules += _blocks("mid_block", (0,), ("middle_block.0",), "middle_block.1")
    rules += _blocks("mid_block", (1,), ("middle_block.2",), None)
    per_block = config.layers_per_block + 1
    for block, kind in enumerate(config.down_block_types):
        first = 1 + block * per_block
        for layer in range(config.layers_per_block):
            place = f"input_blocks.{first + layer}"
            rules += _blocks(
                f"down_blocks.{block}", (layer,), (f"{place}.0",), f"{place}.1" if "Cross" in kind else None
            )
        rules.append(
            Rule(rf"down_blocks\.{block}\.downsamplers\.0\.conv", f"input_blocks.{first + per_block - 1}.0.op")
        )
    for block, kind in enumerate(config.up_block_types):
        for layer in range(per_block):
            place = f"output_blocks.{block * per_block + layer}"
            rules += _blocks(f"up_blocks.{block}", (layer,), (f"{place}.0",), f"{place}.1" if "Cross" in kind else None)
        after = 2 if "Cross" in kind else 1
        last = f"output_blocks.{block * per_block + per_block - 1}.{after}.conv"
        rules.append(Rule(rf"up_blocks\.{block}\.upsamplers\.0\.conv", last))
    return rules


def _blocks(ours: str, layers: tuple[int, ...], resnets: tuple[str, ...], attention: str | None) -> Iterator[Rule]:
    """Layers of a block: their resnets, and the attention behind the first of them where there is one."""
    escaped = ours.replace(".", r"\.")
    for layer, place in zip(layers, resnets, strict=True):
        yield from (Rule(rf"{escaped}\.resnets\.{layer}\.{name}", f"{place}.{theirs}") for name, theirs in _RESNET)
    if attention is not None:
        yield Rule(rf"{escaped}\.attentions\.{layers[0]}\.(.+)", rf"{attention}.\1")


NAMES: Mapping[str, Rules] = MappingProxyType(
    {
        "FluxTransformer2DModel": flux,
        "Flux2Transformer2DModel": flux2,
        "SD3Transformer2DModel": _sd3,
        "WanTransformer3DModel": wan,
        "ZImageTransformer2DModel": _z_image,
        "SanaTransformer2DModel": _sana,
        "QwenImageTransformer2DModel": _as_here,
        "QwenImage21Transformer2DModel": _qwen_image_21,
        "HunyuanVideo15Transformer3DModel": hunyuan_video,
        "CogVideoXTransformer3DModel": cogvideox,
        "LTX2VideoTransformer3DModel": ltx2,
        "UNet2DConditionModel": _unet,
    }
)
"""Rules by the network's class in diffusers."""

UNUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # A norm of Lumina 2's.
        "ZImageTransformer2DModel": ("norm_final.weight",),
        "SanaTransformer2DModel": ("pos_embed", "y_embedder.y_embedding"),
        # What reads the prompt: a part of its own in diffusers.
        "LTX2VideoTransformer3DModel": ("video_embeddings_connector.", "audio_embeddings_connector."),
    }
)
"""What files hold of a network beside what it computes with: tensors, and where a dot ends it, all of a part."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "SanaTransformer2DModel": "ComfyUI itself has no Sana, only nodes of others, each with files of its own; the "
        "export without --format is what diffusers reads",
    }
)
"""Why a network's weights are not handed over under original names."""
