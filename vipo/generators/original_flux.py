"""Black Forest Labs' names of FLUX.1 and FLUX.2; other networks have the same blocks."""

from collections.abc import Iterator
from typing import Any

from vipo.generators.original import Rule, joined


def flux(config: Any) -> list[Rule]:
    """FLUX.1 (Black Forest Labs' flux)."""
    single = r"single_transformer_blocks\.(\d+)\."
    embedders = (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
    return [
        *double_blocks(),
        *joined(single, (r"attn\.to_q", r"attn\.to_k", r"attn\.to_v", "proj_mlp"), r"single_blocks.\1.linear1"),
        *(
            Rule(rf"time_text_embed\.{ours}_embedder\.linear_{number}", f"{theirs}_in.{layer}_layer")
            for ours, theirs in embedders
            for number, layer in ((1, "in"), (2, "out"))
        ),
        Rule("context_embedder", "txt_in"),
        Rule("x_embedder", "img_in"),
        Rule(single + r"norm\.linear", r"single_blocks.\1.modulation.lin"),
        *_single_norms(single),
        Rule(single + "proj_out", r"single_blocks.\1.linear2"),
        *last_layer(),
    ]


def double_blocks() -> Iterator[Rule]:
    """Blocks of FLUX.1, which ComfyUI's HunyuanVideo has too."""
    double = r"transformer_blocks\.(\d+)\."
    yield from _double_attention(double)
    for ours, theirs in (("", "img"), ("_context", "txt")):
        yield Rule(rf"{double}norm1{ours}\.linear", rf"double_blocks.\1.{theirs}_mod.lin")
        yield Rule(rf"{double}ff{ours}\.net\.0\.proj", rf"double_blocks.\1.{theirs}_mlp.0")
        yield Rule(rf"{double}ff{ours}\.net\.2", rf"double_blocks.\1.{theirs}_mlp.2")


def last_layer() -> Iterator[Rule]:
    """What makes the prediction of the tokens."""
    yield Rule("proj_out", "final_layer.linear")
    yield Rule(r"norm_out\.linear", "final_layer.adaLN_modulation.1", turned=True)


def _double_attention(double: str) -> Iterator[Rule]:
    yield from joined(double + r"attn\.", ("to_q", "to_k", "to_v"), r"double_blocks.\1.img_attn.qkv")
    yield from joined(double + r"attn\.add_", ("q_proj", "k_proj", "v_proj"), r"double_blocks.\1.txt_attn.qkv")
    yield Rule(double + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj")
    yield Rule(double + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj")
    for ours, theirs in (("", "img"), ("added_", "txt")):
        for letter, word in (("q", "query"), ("k", "key")):
            name = rf"double_blocks.\1.{theirs}_attn.norm.{word}_norm"
            yield Rule(rf"{double}attn\.norm_{ours}{letter}", name, weight="scale")


def _single_norms(single: str) -> Iterator[Rule]:
    for letter, word in (("q", "query"), ("k", "key")):
        yield Rule(rf"{single}attn\.norm_{letter}", rf"single_blocks.\1.norm.{word}_norm", weight="scale")


def flux2(config: Any) -> list[Rule]:
    """FLUX.2 dev and klein."""
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    return [
        *_double_attention(double),
        *_single_norms(single),
        *(
            Rule(rf"{double}{ours}\.linear_{end}", rf"double_blocks.\1.{theirs}_mlp.{number}")
            for ours, theirs in (("ff", "img"), ("ff_context", "txt"))
            for end, number in (("in", 0), ("out", 2))
        ),
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
        *last_layer(),
    ]
