"""The original repositories' names of each family's layers, as diffusers' own converters read them.

One function a family, of the network's configuration. What these give back through diffusers' converter is the network
again, every tensor of it: ``tests/unit/test_original_names.py``.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from vipo.handover.original import Rule

Rules = Callable[[Any], list[Rule]]


def _joined(pattern: str, parts: tuple[str, ...], template: str) -> Iterator[Rule]:
    """Several layers, ``<pattern><part>``, whose rows are one layer of the original."""
    for number, part in enumerate(parts):
        yield Rule(pattern + part, template, part=number)


def _flux(config: Any) -> list[Rule]:
    """FLUX.1 (Black Forest Labs' flux)."""
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    embedders = (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
    return [
        *_joined(double + r"attn\.", ("to_q", "to_k", "to_v"), r"double_blocks.\1.img_attn.qkv"),
        *_joined(double + r"attn\.add_", ("q_proj", "k_proj", "v_proj"), r"double_blocks.\1.txt_attn.qkv"),
        *_joined(single, (r"attn\.to_q", r"attn\.to_k", r"attn\.to_v", "proj_mlp"), r"single_blocks.\1.linear1"),
        *(
            Rule(rf"time_text_embed\.{ours}_embedder\.linear_{number}", f"{theirs}_in.{layer}_layer")
            for ours, theirs in embedders
            for number, layer in ((1, "in"), (2, "out"))
        ),
        Rule("context_embedder", "txt_in"),
        Rule("x_embedder", "img_in"),
        Rule(double + r"norm1\.linear", r"double_blocks.\1.img_mod.lin"),
        Rule(double + r"norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
        *_double_norms(double),
        Rule(double + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
        Rule(double + r"ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
        Rule(double + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
        Rule(double + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
        Rule(double + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        Rule(double + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        Rule(single + r"norm\.linear", r"single_blocks.\1.modulation.lin"),
        *_single_norms(single),
        Rule(single + "proj_out", r"single_blocks.\1.linear2"),
        Rule("proj_out", "final_layer.linear"),
        Rule(r"norm_out\.linear", "final_layer.adaLN_modulation.1", turned=True),
    ]


def _double_norms(double: str) -> Iterator[Rule]:
    for ours, theirs in (("", "img"), ("added_", "txt")):
        for letter, word in (("q", "query"), ("k", "key")):
            name = rf"double_blocks.\1.{theirs}_attn.norm.{word}_norm"
            yield Rule(rf"{double}attn\.norm_{ours}{letter}", name, weight="scale")


def _single_norms(single: str) -> Iterator[Rule]:
    for letter, word in (("q", "query"), ("k", "key")):
        yield Rule(rf"{single}attn\.norm_{letter}", rf"single_blocks.\1.norm.{word}_norm", weight="scale")


def _flux2(config: Any) -> list[Rule]:
    """FLUX.2 dev and klein."""
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    return [
        *_joined(double + r"attn\.", ("to_q", "to_k", "to_v"), r"double_blocks.\1.img_attn.qkv"),
        *_joined(double + r"attn\.add_", ("q_proj", "k_proj", "v_proj"), r"double_blocks.\1.txt_attn.qkv"),
        *_double_norms(double),
        *_single_norms(single),
        *(
            Rule(rf"{double}{ours}\.linear_{end}", rf"double_blocks.\1.{theirs}_mlp.{number}")
            for ours, theirs in (("ff", "img"), ("ff_context", "txt"))
            for end, number in (("in", 0), ("out", 2))
        ),
        Rule(double + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        Rule(double + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        Rule(single + r"attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        Rule(single + r"attn\.to_out", r"single_blocks.\1.linear2"),
        *(
            Rule(rf"time_guidance_embed\.{ours}_embedder\.linear_{number}", f"{theirs}_in.{layer}_layer")
            for ours, theirs in (("timestep", "time"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        ),
        Rule("context_embedder", "txt_in"),
        Rule("x_embedder", "img_in"),
        Rule(r"((double|single)_stream_modulation(_img|_txt)?)\.linear", r"\1.lin"),
        Rule("proj_out", "final_layer.linear"),
        Rule(r"norm_out\.linear", "final_layer.adaLN_modulation.1", turned=True),
    ]


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
        *_joined(block + r"attn\.", ("to_q", "to_k", "to_v"), x + "attn.qkv"),
        *_joined(block + r"attn\.add_", ("q_proj", "k_proj", "v_proj"), context + "attn.qkv"),
        *_joined(block + r"attn2\.", ("to_q", "to_k", "to_v"), x + "attn2.qkv"),
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
        Rule("proj_out", "final_layer.linear"),
        Rule(r"norm_out\.linear", "final_layer.adaLN_modulation.1", turned=True),
    ]


def _wan(config: Any) -> list[Rule]:
    """Wan 2.1 and 2.2 (Wan-Video's)."""
    block, theirs = r"blocks\.(\d+)\.", r"blocks.\1."
    return [
        *(
            Rule(rf"condition_embedder\.{kind}_embedder\.linear_{number}", f"{kind}_embedding.{place}")
            for kind in ("time", "text")
            for number, place in ((1, 0), (2, 2))
        ),
        Rule(r"condition_embedder\.time_proj", "time_projection.1"),
        Rule("patch_embedding", "patch_embedding"),
        *(
            Rule(rf"{block}{ours}\.{layer}", f"{theirs}{name}.{short}")
            for ours, name in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for layer, short in (
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                (r"to_out\.0", "o"),
                ("norm_q", "norm_q"),
                ("norm_k", "norm_k"),
            )
        ),
        Rule(block + r"ffn\.net\.0\.proj", theirs + "ffn.0"),
        Rule(block + r"ffn\.net\.2", theirs + "ffn.2"),
        # diffusers counts norms in their order, the original by what they are of.
        Rule(block + "norm2", theirs + "norm3"),
        Rule(block + "scale_shift_table", theirs + "modulation"),
        Rule("scale_shift_table", "head.modulation"),
        Rule("proj_out", "head.head"),
    ]


def _z_image(config: Any) -> list[Rule]:
    """Z-Image (Tongyi's)."""
    return [
        *_joined(r"(.+\.attention)\.", ("to_q", "to_k", "to_v"), r"\1.qkv"),
        Rule(r"(.+\.attention)\.to_out\.0", r"\1.out"),
        Rule(r"(.+\.attention)\.norm_([qk])", r"\1.\2_norm"),
        Rule(r"all_(final_layer|x_embedder)\.2-1(.*)", r"\1\2"),
        Rule(r"(.+)", r"\1"),
    ]


def _as_here(config: Any) -> list[Rule]:
    """Qwen-Image: diffusers took the original names over."""
    return [Rule(r"(.+)", r"\1")]


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
        "FluxTransformer2DModel": _flux,
        "Flux2Transformer2DModel": _flux2,
        "SD3Transformer2DModel": _sd3,
        "WanTransformer3DModel": _wan,
        "ZImageTransformer2DModel": _z_image,
        "QwenImageTransformer2DModel": _as_here,
        "UNet2DConditionModel": _unet,
    }
)
"""Rules by the network's class in diffusers."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "SanaTransformer2DModel": "the original holds tensors that diffusers' layout lacks",
        "CogVideoXTransformer3DModel": "diffusers has no converter that its map could be tested by",
        "HunyuanVideo15Transformer3DModel": "diffusers has no converter that its map could be tested by",
    }
)
"""Why a network's weights are not handed over under original names."""
