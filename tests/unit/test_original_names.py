"""Names for ComfyUI: diffusers' own converters, or the published maps, give every tensor of each network back."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    LTX2VideoTransformer3DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import lora_conversion_utils as lora_utils
from diffusers.loaders import single_file_utils as utils
from published_names import cogvideox_from_comfyui, hunyuan_in_comfyui, hunyuan_layers
from torch import Tensor

from vipo.config.registries import FAMILIES
from vipo.generators.original import (
    PREFIX,
    NamesError,
    Rule,
    original_lora,
    original_state,
    place_of,
    state_of_original,
)
from vipo.generators.original_names import NAMES, REFUSED, UNUSED
from vipo.generators.original_videos import whole_refused

# Few blocks, and of FLUX.1 as many rows as published, for its converter counts them; columns are cut to two.
NETWORKS: Mapping[str, Callable[[], Any]] = {
    "FluxTransformer2DModel": lambda: FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True),
    "Flux2Transformer2DModel": lambda: Flux2Transformer2DModel(
        num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=128, joint_attention_dim=64
    ),
    "SD3Transformer2DModel": lambda: SD3Transformer2DModel(
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        sample_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
    "WanTransformer3DModel": lambda: WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=40, num_layers=2, text_dim=20, freq_dim=16,
        cross_attn_norm=True, rope_max_seq_len=32,
    ),
    "ZImageTransformer2DModel": lambda: ZImageTransformer2DModel(
        dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24, axes_dims=[8, 12, 12],
        axes_lens=[16, 16, 16],
    ),
    "SanaTransformer2DModel": lambda: SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
    ),
    "QwenImageTransformer2DModel": lambda: QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6)
    ),
    "QwenImage21Transformer2DModel": lambda: QwenImage21Transformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=24, axes_dims_rope=(4, 6, 6)
    ),
    "UNet2DConditionModel": lambda: UNet2DConditionModel(
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    ),
    "HunyuanVideo15Transformer3DModel": lambda: HunyuanVideo15Transformer3DModel(
        num_layers=3, num_refiner_layers=2, num_attention_heads=2, attention_head_dim=16, text_embed_dim=20,
        text_embed_2_dim=12, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
    ),
    "CogVideoXTransformer3DModel": lambda: CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=20, time_embed_dim=8,
        max_text_seq_length=4, use_rotary_positional_embeddings=True,
    ),
    # All that LTX-2 and 2.3 have.
    "LTX2VideoTransformer3DModel": lambda: LTX2VideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, audio_num_attention_heads=2,
        audio_attention_head_dim=6, audio_cross_attention_dim=12, num_layers=2, caption_channels=16, gated_attn=True,
        audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True,
    ),
}  # fmt: skip


def _ltx2_back(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """By the converter of LoRA: that of whole files leaves the names that are 2.3's alone (diffusers 0.42)."""
    back = lora_utils._convert_non_diffusers_ltx2_lora_to_diffusers(
        {PREFIX + name: value for name, value in state.items()}
    )
    return {name.removeprefix("transformer."): value for name, value in back.items()}


def _hunyuan_back(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """By the published maps: each name of ComfyUI's is made of layers of ours, whose rows it has below each other."""
    network, _ = _network("HunyuanVideo15Transformer3DModel")
    layers = hunyuan_layers(config.num_layers, config.num_refiner_layers)
    # Which rows come from where: a network whose values are their own places.
    ours = {name: (number, len(value)) for number, (name, value) in enumerate(network.items())}
    places = {name: number + torch.arange(rows, dtype=torch.float64) / 4096 for name, (number, rows) in ours.items()}
    shown, names = hunyuan_in_comfyui(places, layers), list(ours)
    assert state.keys() == shown.keys()
    back = {name: torch.full_like(value, torch.nan) for name, value in network.items()}
    for name, rows in shown.items():
        for value, row in zip(state[name], rows.tolist(), strict=True):
            back[names[int(row)]][round(4096 * (row % 1))] = value
    return back


def _sana_back(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    beside = dict.fromkeys(UNUSED["SanaTransformer2DModel"], torch.zeros(1))
    return utils.convert_sana_transformer_to_diffusers(state | beside)


def _unet_back(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    named = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    return utils.convert_ldm_unet_checkpoint(named, config)


BACK: Mapping[str, Callable[[dict[str, Tensor], Any], dict[str, Tensor]]] = {
    "FluxTransformer2DModel": lambda state, _: utils.convert_flux_transformer_checkpoint_to_diffusers(state),
    "Flux2Transformer2DModel": lambda state, _: utils.convert_flux2_transformer_checkpoint_to_diffusers(state),
    "SD3Transformer2DModel": lambda state, _: utils.convert_sd3_transformer_checkpoint_to_diffusers(state),
    "WanTransformer3DModel": lambda state, _: utils.convert_wan_transformer_to_diffusers(state),
    "ZImageTransformer2DModel": lambda state, _: utils.convert_z_image_transformer_checkpoint_to_diffusers(state),
    "SanaTransformer2DModel": _sana_back,
    "QwenImageTransformer2DModel": lambda state, _: state,
    "QwenImage21Transformer2DModel": lambda state, _: utils.convert_qwen_image21_transformer_checkpoint_to_diffusers(
        state
    ),
    "UNet2DConditionModel": _unet_back,
    "HunyuanVideo15Transformer3DModel": _hunyuan_back,
    "CogVideoXTransformer3DModel": lambda state, _: cogvideox_from_comfyui(state),
    "LTX2VideoTransformer3DModel": _ltx2_back,
}


def _network(name: str) -> tuple[dict[str, Tensor], Any]:
    """Random tensors of a network's names, as many rows and at most two columns as it has; and its configuration."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = NETWORKS[name]()
    shapes = {
        key: (value.shape[0], *(min(side, 2) for side in value.shape[1:]))
        for key, value in network.state_dict().items()
    }
    if name == "SD3Transformer2DModel":
        # Its converter reads the width of the captions off a weight.
        shapes["context_embedder.weight"] = (32, 24)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, network.config


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_own_converter_gives_the_network_back(name: str) -> None:
    state, config = _network(name)
    original = original_state(state, NAMES[name](config))
    back = BACK[name](dict(original), config)
    assert back.keys() == state.keys()
    read = state_of_original(original, {key: value.shape for key, value in state.items()}, NAMES[name](config))
    assert read.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key
        assert torch.equal(read[key], value), key


@pytest.mark.parametrize(("guided", "tensors"), [(True, 780), (False, 776)])
def test_flux_at_its_published_size_is_what_diffusers_reads(guided: bool, tensors: int) -> None:
    """All 57 blocks of FLUX.1-dev or schnell, without data: shapes, which name what the authors' file holds."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=guided)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    rules = NAMES["FluxTransformer2DModel"](network.config)
    original = original_state(network.state_dict(), rules)
    assert len(original) == tensors
    assert original["double_blocks.18.img_attn.qkv.weight"].shape == (9216, 3072)
    assert original["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    for read in (
        utils.convert_flux_transformer_checkpoint_to_diffusers(dict(original)),
        state_of_original(original, shapes, rules),
    ):
        assert {key: tuple(value.shape) for key, value in read.items()} == shapes


@pytest.mark.parametrize("name", NETWORKS)
def test_lora_is_the_same_change_of_the_original_s_layers(name: str) -> None:
    """Layers of attention, some left out: their products are what the rules make of ours."""
    state, config = _network(name)
    rules, generator = NAMES[name](config), torch.Generator().manual_seed(1)
    weights = {key: value for key, value in state.items() if key.endswith(".weight") and value.ndim == 2}
    rows = {key.removesuffix(".weight"): len(value) for key, value in weights.items()}
    layers, change = {}, {key: torch.zeros_like(value) for key, value in state.items()}
    for number, (key, value) in enumerate(weights.items()):
        if "attn" not in key and "attention" not in key and "proj" not in key:
            continue
        # Of what the original joins, a part may not be adapted.
        if key.endswith(("to_k.weight", "add_k_proj.weight")):
            continue
        down = torch.randn(1 + number % 3, value.shape[1], generator=generator, dtype=torch.float64)
        up = torch.randn(len(value), len(down), generator=generator, dtype=torch.float64)
        layer = key.removesuffix(".weight")
        layers |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        change[key] = up @ down
    assert layers
    found, count = original_lora(layers, rows, rules)
    assert count == len(layers) // 2
    whole = original_state({key: value.double() for key, value in change.items()}, rules)
    names = {key.removeprefix(PREFIX).rsplit(".", 2)[0] for key in found}
    for layer in names:
        down, up = (found[f"{PREFIX}{layer}.lora_{side}.weight"] for side in "AB")
        # What ComfyUI looks for: the name of a tensor of the original.
        assert torch.allclose(up @ down, whole[f"{layer}.weight"], atol=1e-12), layer
    adapted = {name for name, value in whole.items() if bool(value.abs().sum() > 0)}
    assert adapted == {f"{layer}.weight" for layer in names}


@pytest.mark.parametrize(
    ("name", "back"),
    [
        ("WanTransformer3DModel", lora_utils._convert_non_diffusers_wan_lora_to_diffusers),
        ("Flux2Transformer2DModel", lora_utils._convert_non_diffusers_flux2_lora_to_diffusers),
        ("LTX2VideoTransformer3DModel", lora_utils._convert_non_diffusers_ltx2_lora_to_diffusers),
    ],
)
def test_diffusers_reads_the_lora_again(name: str, back: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    state, config = _network(name)
    generator, layers = torch.Generator().manual_seed(2), {}
    targets = [key.removesuffix(".weight") for key in state if ".to_" in key and key.endswith(".weight")]
    targets += [key.removesuffix(".weight") for key in state if ".add_" in key and key.endswith("proj.weight")]
    for layer in targets:
        value = state[f"{layer}.weight"]
        layers[f"{layer}.lora_A.weight"] = torch.randn(2, value.shape[1], generator=generator)
        layers[f"{layer}.lora_B.weight"] = torch.randn(len(value), 2, generator=generator)
    rows = {key.removesuffix(".weight"): len(value) for key, value in state.items() if key.endswith(".weight")}
    found, _ = original_lora(layers, rows, NAMES[name](config))
    read = back(dict(found))
    assert {key.removeprefix("transformer.") for key in read} == layers.keys()
    for layer in targets:
        ours, theirs = (
            source[f"{prefix}{layer}.lora_B.weight"] @ source[f"{prefix}{layer}.lora_A.weight"]
            for source, prefix in ((layers, ""), (read, "transformer."))
        )
        assert torch.allclose(ours, theirs, atol=1e-5), layer


def test_wan_s_names_are_those_that_comfyui_knows() -> None:
    """The published checkpoint's 30 blocks with the default targets: all 240 modules."""
    rules = NAMES["WanTransformer3DModel"](None)
    layers = {}
    for block in range(30):
        for attention in ("attn1", "attn2"):
            for target in ("to_q", "to_k", "to_v", "to_out.0"):
                name = f"blocks.{block}.{attention}.{target}"
                layers |= {f"{name}.lora_A.weight": torch.zeros(1, 2), f"{name}.lora_B.weight": torch.zeros(2, 1)}
    found, count = original_lora(layers, {}, rules)
    assert count == 240
    expected = {
        f"diffusion_model.blocks.{block}.{kind}_attn.{letter}.lora_{side}.weight"
        for block in range(30)
        for kind in ("self", "cross")
        for letter in "qkvo"
        for side in "AB"
    }
    assert found.keys() == expected


def test_ltx2_s_names_of_the_default_targets_are_lightricks() -> None:
    """The published checkpoint's 48 blocks, without the modules of the sound: all 384 modules."""
    attentions = [f"transformer_blocks.{block}.{name}" for block in range(48) for name in ("attn1", "attn2")]
    layers = [f"{attention}.to_{target}" for attention in attentions for target in ("q", "k", "v", "out.0")]
    adapted = {f"{layer}.lora_{side}.weight": torch.zeros(1, 1) for layer in layers for side in "AB"}
    found, count = original_lora(adapted, {}, NAMES["LTX2VideoTransformer3DModel"](None))
    assert count == 384
    assert found.keys() == {f"diffusion_model.{name}" for name in adapted}


def test_hunyuan_s_names_are_those_that_comfyui_makes_of_the_authors() -> None:
    """What its loader renames, and a LoRA of attention: the 54 blocks and 2 refiners of the published checkpoint."""
    state, config = _network("HunyuanVideo15Transformer3DModel")
    found = original_state(state, NAMES["HunyuanVideo15Transformer3DModel"](config))
    expected = hunyuan_in_comfyui(state, hunyuan_layers(config.num_layers, config.num_refiner_layers))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    layers = [f"transformer_blocks.{block}.attn" for block in range(54)]
    layers += [f"context_embedder.token_refiner.refiner_blocks.{block}.attn" for block in range(2)]
    targets = [f"{layer}.to_{name}" for layer in layers for name in ("q", "k", "v", "out.0")]
    adapted = {f"{name}.lora_A.weight": torch.zeros(1, 2) for name in targets}
    adapted |= {f"{name}.lora_B.weight": torch.zeros(2, 1) for name in targets}
    made, count = original_lora(adapted, dict.fromkeys(targets, 2), NAMES["HunyuanVideo15Transformer3DModel"](config))
    assert count == 224
    wanted = {f"double_blocks.{block}.img_attn.{name}" for block in range(54) for name in ("qkv", "proj")}
    refiner = "txt_in.individual_token_refiner.blocks"
    wanted |= {f"{refiner}.{block}.self_attn.{name}" for block in range(2) for name in ("qkv", "proj")}
    assert made.keys() == {f"diffusion_model.{name}.lora_{side}.weight" for name in wanted for side in "AB"}


def test_what_comfyui_would_take_for_another_network_is_refused() -> None:
    for rotary in (True, False):
        told = whole_refused("CogVideoXTransformer3DModel", {"use_rotary_positional_embeddings": rotary})
        assert (told is None) == rotary
    assert whole_refused("WanTransformer3DModel", {}) is None
    assert "connectors" in str(whole_refused("LTX2VideoTransformer3DModel", {}))


def test_what_has_no_place_is_refused_by_name() -> None:
    with pytest.raises(NamesError, match=r"blocks\.0\.added: has no name"):
        place_of("blocks.0.added", NAMES["WanTransformer3DModel"](None))
    with pytest.raises(NamesError, match="no pair"):
        original_lora({"proj_out.lora_A.weight": torch.zeros(1, 1)}, {}, NAMES["WanTransformer3DModel"](None))
    parts = [Rule("q", "qkv", part=0), Rule("k", "qkv", part=1), Rule("v", "qkv", part=2)]
    with pytest.raises(NamesError, match=r"qkv\.weight: a part"):
        original_state({"q.weight": torch.zeros(1), "v.weight": torch.zeros(1)}, parts)


def test_every_family_has_a_map_or_a_reason() -> None:
    import pkgutil

    networks = {pkgutil.resolve_name(path).network_class.__name__ for path in FAMILIES.values()}
    assert networks == NAMES.keys() | REFUSED.keys()
    assert math.prod(map(len, REFUSED.values())) > 0
