"""Names of networks for videos that ComfyUI knows."""

from collections.abc import Mapping
from typing import Any

from vipo.generators.original import Rule, joined
from vipo.generators.original_flux import double_blocks, last_layer


def wan(config: Any) -> list[Rule]:
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


def hunyuan_video(config: Any) -> list[Rule]:
    """HunyuanVideo 1.5, as ComfyUI holds it: the authors' own files have q, k and v of a block apart."""
    refiner, theirs = (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.",
        "txt_in.individual_token_refiner.blocks",
    )
    embedders = (
        (r"time_embed\.timestep_embedder", "time_in"),
        (r"context_embedder\.time_text_embed\.timestep_embedder", "txt_in.t_embedder"),
        (r"context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
    )
    return [
        *double_blocks(),
        *joined(refiner + r"attn\.", ("to_q", "to_k", "to_v"), rf"{theirs}.\1.self_attn.qkv"),
        *(
            Rule(refiner + ours, rf"{theirs}.\1.{layer}")
            for ours, layer in (
                (r"attn\.to_out\.0", "self_attn.proj"),
                ("norm1", "norm1"),
                ("norm2", "norm2"),
                (r"ff\.net\.0\.proj", "mlp.0"),
                (r"ff\.net\.2", "mlp.2"),
                (r"norm_out\.linear", "adaLN_modulation.1"),
            )
        ),
        *(
            Rule(rf"{ours}\.linear_{number}", f"{name}.{layer}_layer")
            for ours, name in embedders
            for number, layer in ((1, "in"), (2, "out"))
        ),
        Rule(r"context_embedder\.proj_in", "txt_in.input_embedder"),
        Rule(r"context_embedder_2\.norm", "byt5_in.layernorm"),
        Rule(r"context_embedder_2\.linear_(\d)", r"byt5_in.fc\1"),
        *(
            Rule(rf"image_embedder\.{ours}", f"vision_in.proj.{place}")
            for ours, place in (("norm_in", 0), ("linear_1", 1), ("linear_2", 3), ("norm_out", 4))
        ),
        Rule(r"x_embedder\.proj", "img_in.proj"),
        Rule("cond_type_embed", "cond_type_embedding"),
        *last_layer(),
    ]


def cogvideox(config: Any) -> list[Rule]:
    """CogVideoX, as ComfyUI holds it: the authors' own files (SAT) are read by nothing else."""
    block, theirs = r"transformer_blocks\.(\d+)\.", r"blocks.\1."
    return [
        Rule(block + r"attn1\.to_([qkv])", theirs + r"\2"),
        Rule(block + r"attn1\.to_out\.0", theirs + "attn_out"),
        Rule(block + r"attn1\.norm_([qk])", theirs + r"norm_\2"),
        Rule(block + r"ff\.net\.0\.proj", theirs + "ff_proj"),
        Rule(block + r"ff\.net\.2", theirs + "ff_out"),
        Rule(block + r"(norm[12]\..+)", theirs + r"\2"),
        Rule(r"time_embedding\.linear_([12])", r"time_embedding_linear_\1"),
        Rule(r"(patch_embed\..+|norm_final|norm_out\..+|proj_out)", r"\1"),
    ]


def ltx2(config: Any) -> list[Rule]:
    """LTX-2 and 2.3 (Lightricks')."""
    return [
        Rule("(audio_|)proj_in", r"\1patchify_proj"),
        Rule(r"(audio_|)time_embed\.(.+)", r"\1adaln_single.\2"),
        Rule(r"(audio_|)prompt_adaln\.(.+)", r"\1prompt_adaln_single.\2"),
        Rule(r"av_cross_attn_(video|audio)_scale_shift\.(.+)", r"av_ca_\1_scale_shift_adaln_single.\2"),
        Rule(r"av_cross_attn_(?:video|audio)_(a2v|v2a)_gate\.(.+)", r"av_ca_\1_gate_adaln_single.\2"),
        Rule(r"(.+\.)(video|audio)_a2v_cross_attn_scale_shift_table", r"\1scale_shift_table_a2v_ca_\2"),
        Rule(r"(.+)\.norm_([qk])", r"\1.\2_norm"),
        Rule("(.+)", r"\1"),
    ]


def whole_refused(network: str, settings: Mapping[str, Any]) -> str | None:
    """Why a network's whole weights, unlike its LoRA, are not handed over; None: they are.

    Args:
        network: class in diffusers.
        settings: of it.
    """
    if network == "LTX2VideoTransformer3DModel":
        return "ComfyUI reads its text connectors from the same file, and they are no part of it here; hand over LoRA"
    if network == "CogVideoXTransformer3DModel" and not settings.get("use_rotary_positional_embeddings"):
        return (
            "ComfyUI takes a CogVideoX file without 'patch_embed.pos_embedding' for one with rotary positions, and the "
            "2B has neither; hand over LoRA"
        )
    return None
