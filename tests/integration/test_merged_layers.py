"""Every layer of a LoRA file is merged at its own strength, in the namings that its family's files are published in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from families import FAMILIES
from safetensors.torch import save_file
from torch import Tensor

from vipo.generators import GeneratorError, load_generator

ROOT = Path(__file__).resolve().parents[2]
_KOHYA, _PEFT, _DOTTED = ("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")
_UNET = "mid_block.attentions.0.transformer_blocks.0"
_MUSUBI = {
    f"lora_unet_blocks_{block}_{theirs}": f"blocks.{block}.{ours}"
    for block in range(2)
    for theirs, ours in [
        *(
            (f"{kind}_attn_{end}", f"attn{number}.{name}")
            for kind, number in (("self", 1), ("cross", 2))
            for end, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
        ),
        ("ffn_0", "ffn.net.0.proj"),
        ("ffn_2", "ffn.net.2"),
    ]
}


def _network(family: str, folder: Path, **changes: object) -> dict[str, Tensor]:
    network: Any = load_generator(FAMILIES[family].config(folder, **changes), ROOT).network
    return {name: value.detach() for name, value in network.named_parameters()}


def _layer(name: str, shape: tuple[int, ...], rank: int, sides: tuple[str, str], seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    (out, into), (down, up) = shape[:2], sides
    of = {down: (rank, into, *shape[2:]), up: (out, rank, *(1 for _ in shape[2:]))}
    return {f"{name}.{side}.weight": torch.randn(size, generator=drawn) / 4 for side, size in of.items()}


def _product(file: Mapping[str, Tensor], layer: str, sides: tuple[str, str]) -> Tensor:
    down, up = (file[f"{layer}.{side}.weight"].flatten(1) for side in sides)
    return up @ down


@pytest.mark.parametrize(
    ("family", "layers", "sides"),
    [
        # What stands outside of the blocks the stock pipeline adds without its alpha, or not at all.
        (
            "flux",
            {
                "lora_unet_final_layer_linear": "proj_out",
                "lora_unet_double_blocks_0_img_attn_proj": "transformer_blocks.0.attn.to_out.0",
                "lora_unet_img_in": "x_embedder",
            },
            _KOHYA,
        ),
        ("flux", {"lora_transformer_proj_out": "proj_out"}, _KOHYA),
        ("flux", {"transformer.proj_out": "proj_out", "transformer.x_embedder": "x_embedder"}, _PEFT),
        # Alphas of its attention the stock pipeline looks for under names that its network does not have.
        *(
            (
                family,
                {
                    f"lora_unet_{name.replace('.', '_')}": name
                    for name in (*(f"{_UNET}.attn1.to_{x}" for x in ("q", "k", "v", "out.0")), f"{_UNET}.ff.net.2")
                },
                _KOHYA,
            )
            for family in ("sd", "sdxl")
        ),
        (
            "sd",
            {"lora_unet_conv_in": "conv_in", "lora_unet_mid_block_resnets_0_conv1": "mid_block.resnets.0.conv1"},
            _KOHYA,
        ),
        (
            "sd3",
            {f"transformer.transformer_blocks.0.attn.to_{x}": f"transformer_blocks.0.attn.to_{x}" for x in "qk"},
            _PEFT,
        ),
        (
            "flux2_klein",
            {
                "lora_unet_final_layer_linear": "proj_out",
                "lora_unet_double_blocks_0_txt_mlp_2": "transformer_blocks.0.ff_context.linear_out",
                "lora_unet_single_blocks_0_linear2": "single_transformer_blocks.0.attn.to_out",
            },
            _KOHYA,
        ),
        (
            "flux2_klein",
            {
                "diffusion_model.final_layer.linear": "proj_out",
                "diffusion_model.double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
            },
            _PEFT,
        ),
        (
            "wan",
            {
                "diffusion_model.blocks.0.self_attn.q": "blocks.0.attn1.to_q",
                "diffusion_model.blocks.1.ffn.2": "blocks.1.ffn.net.2",
                "diffusion_model.head.head": "proj_out",
                "diffusion_model.time_projection.1": "condition_embedder.time_proj",
            },
            _KOHYA,
        ),
        ("wan", _MUSUBI, _KOHYA),
        (
            "qwen_image",
            {
                "lora_unet_transformer_blocks_0_attn_to_q": "transformer_blocks.0.attn.to_q",
                "lora_unet_proj_out": "proj_out",
            },
            _KOHYA,
        ),
        (
            "qwen_image",
            {f"transformer_blocks.{x}.attn.to_q": f"transformer_blocks.{x}.attn.to_q" for x in (0, 1)},
            _KOHYA,
        ),
        ("qwen_image", {"diffusion_model.proj_out": "proj_out"}, _PEFT),
        ("qwen_image_21", {"lora_unet_transformer_blocks_0_attn_to_q": "transformer_blocks.0.attn.to_q"}, _KOHYA),
        (
            "qwen_image_21",
            {f"diffusion_model.{x}": x for x in ("transformer_blocks.1.img_mlp.gate_layer", "img_in", "proj_out")},
            _PEFT,
        ),
        (
            "z_image",
            {
                "lora_unet_layers_0_attention_to_q": "layers.0.attention.to_q",
                "lora_unet_layers_1_attention_out": "layers.1.attention.to_out.0",
                "lora_unet_noise_refiner_0_attention_to_out_0": "noise_refiner.0.attention.to_out.0",
            },
            _KOHYA,
        ),
        ("z_image", {"diffusion_model.layers.0.attention.to_k": "layers.0.attention.to_k"}, _PEFT),
        ("z_image", {"layers.0.attention.to_k": "layers.0.attention.to_k"}, _DOTTED),
        (
            "ltx2",
            {f"diffusion_model.transformer_blocks.0.attn1.to_{x}": f"transformer_blocks.0.attn1.to_{x}" for x in "qk"},
            _PEFT,
        ),
        *(
            (family, {f"transformer.transformer_blocks.0.{name}": f"transformer_blocks.0.{name}"}, _PEFT)
            for family, name in (("hunyuan_video", "attn.to_q"), ("sana", "attn1.to_q"), ("cogvideox", "attn1.to_q"))
        ),
    ],
)
def test_each_layer_has_its_own_alpha(
    family: str, layers: dict[str, str], sides: tuple[str, str], tmp_path: Path
) -> None:
    folder, file = FAMILIES[family].write(tmp_path / family), tmp_path / "lora.safetensors"
    before = _network(family, folder)
    held: dict[str, Tensor] = {}
    ratios: dict[str, float] = {}
    for number, (theirs, ours) in enumerate(layers.items()):
        rank, alpha = 2 + number % 2, 1 + number
        held |= _layer(theirs, tuple(before[f"{ours}.weight"].shape), rank, sides, number)
        held[f"{theirs}.alpha"] = torch.tensor(float(alpha))
        ratios[theirs] = alpha / rank
    save_file(held, file)
    after = _network(family, folder, start=str(file), start_scale=0.5)
    adds = {f"{ours}.weight": 0.5 * ratios[theirs] * _product(held, theirs, sides) for theirs, ours in layers.items()}
    for name, value in after.items():
        added = adds[name].reshape(value.shape) if name in adds else torch.zeros(())
        torch.testing.assert_close(value, before[name] + added, atol=2e-6, rtol=1e-5)


def test_layers_without_an_alpha_are_not_given_that_of_others(tmp_path: Path) -> None:
    folder, file = FAMILIES["sd"].write(tmp_path / "sd"), tmp_path / "lora.safetensors"
    before = _network("sd", folder)
    names = [f"{_UNET}.attn{number}.to_q" for number in (1, 2)]
    flat = [f"lora_unet_{name.replace('.', '_')}" for name in names]
    held = _layer(flat[0], (16, 16), 2, _KOHYA, 0) | _layer(flat[1], (16, 16), 2, _KOHYA, 1)
    save_file(held | {f"{flat[0]}.alpha": torch.tensor(1.0)}, file)
    after = _network("sd", folder, start=str(file))
    for name, theirs, ratio in zip(names, flat, (0.5, 1.0), strict=True):
        change = after[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(change, ratio * _product(held, theirs, _KOHYA), atol=2e-6, rtol=1e-5)


def test_alphas_count_in_the_file_of_a_second_network(tmp_path: Path) -> None:
    folder, start = FAMILIES["wan22_a14b"].write(tmp_path / "pair"), tmp_path / "start"
    start.mkdir()
    before, layer = _network("wan22_a14b", folder), "blocks.0.attn1.to_q"
    files = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors")
    for number, name in enumerate(files):
        held = _layer(f"transformer.{layer}", (24, 24), 2, _PEFT, number)
        save_file(held | {f"transformer.{layer}.alpha": torch.tensor(3.0 + number)}, start / name)
    after = _network("wan22_a14b", folder, start=str(start))
    for number, part in enumerate(("transformer", "transformer_2")):
        held = _layer(f"transformer.{layer}", (24, 24), 2, _PEFT, number)
        change = after[f"{part}.{layer}.weight"] - before[f"{part}.{layer}.weight"]
        expected = (3 + number) / 2 * _product(held, f"transformer.{layer}", _PEFT)
        torch.testing.assert_close(change, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("added", "metadata", "told"),
    [
        (
            {"diffusion_model.blocks.1.self_attn.k.alpha": torch.tensor(4.0)},
            {},
            r"blocks\.1\.self_attn\.k\.alpha is the",
        ),
        ({"diffusion_model.blocks.0.self_attn.q.alpha": torch.ones(2)}, {}, r"self_attn\.q\.alpha is no number"),
        (
            {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(4.0)},
            {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})},
            "its header has lora_adapter_metadata too",
        ),
    ],
)
def test_an_alpha_that_cannot_count_is_named(
    added: dict[str, Tensor], metadata: dict[str, str], told: str, tmp_path: Path
) -> None:
    folder, file = FAMILIES["wan"].write(tmp_path / "wan"), tmp_path / "lora.safetensors"
    held = _layer("diffusion_model.blocks.0.self_attn.q", (24, 24), 2, _KOHYA, 0) | added
    save_file(held, file, metadata={"format": "pt", **metadata})
    with pytest.raises(GeneratorError, match=rf"lora\.safetensors: .*{told}"):
        _network("wan", folder, start=str(file))


def test_halves_that_the_stock_pipeline_confuses_are_refused(tmp_path: Path) -> None:
    folder, file = FAMILIES["flux2_klein"].write(tmp_path / "flux2"), tmp_path / "lora.safetensors"
    save_file(_layer("diffusion_model.final_layer.adaLN_modulation.1", (64, 32), 2, _PEFT, 0), file)
    with pytest.raises(GeneratorError, match=r"lora\.safetensors: .*adaLN_modulation\.1\.lora_B\.weight: .*shift"):
        _network("flux2_klein", folder, start=str(file))


def _twice(width: int) -> dict[str, Tensor]:
    """A block's attention under names of diffusers, and again under the original ones."""
    block = "lora_unet_layers_0_attention"
    held = _layer(f"{block}_qkv", (3 * width, width), 4, _KOHYA, 0)
    held |= _layer(f"{block}_out", (width, width), 4, _KOHYA, 1)
    ups = held[f"{block}_qkv.lora_up.weight"].chunk(3)
    for name, up in zip("qkv", ups, strict=True):
        held[f"{block}_to_{name}.lora_down.weight"] = held[f"{block}_qkv.lora_down.weight"].clone()
        held[f"{block}_to_{name}.lora_up.weight"] = up.clone()
    for side in _KOHYA:
        held[f"{block}_to_out_0.{side}.weight"] = held[f"{block}_out.{side}.weight"].clone()
    layers = {name.split(".")[0] for name in held}
    return held | {f"{layer}.alpha": torch.tensor(2.0) for layer in layers}


def test_layers_that_z_images_files_hold_twice_are_merged_once(tmp_path: Path) -> None:
    folder, file = FAMILIES["z_image"].write(tmp_path / "z_image"), tmp_path / "lora.safetensors"
    save_file(_twice(32), file)
    found = _network("z_image", folder, start=str(file))
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    before = _network("z_image", folder)
    for name, value in pipeline.transformer.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), atol=1e-6, rtol=0)
    assert not torch.equal(found["layers.0.attention.to_v.weight"], before["layers.0.attention.to_v.weight"])


@pytest.mark.parametrize("changed", ["qkv.lora_up.weight", "out.alpha", "to_k"])
def test_layers_that_are_held_twice_and_differ_are_refused(changed: str, tmp_path: Path) -> None:
    folder, file = FAMILIES["z_image"].write(tmp_path / "z_image"), tmp_path / "lora.safetensors"
    held = _twice(32)
    whole = f"lora_unet_layers_0_attention_{changed}"
    if whole in held:
        held[whole] = held[whole] * 2
    else:
        held = {name: value for name, value in held.items() if not name.startswith(whole)}
    save_file(held, file)
    with pytest.raises(
        GeneratorError, match=r"lora\.safetensors: holds a layer twice, as .*_attention_(qkv|out)\.lora"
    ):
        _network("z_image", folder, start=str(file))
