"""A LoRA is merged whole or not at all: what diffusers drops or scales otherwise is refused, by family and naming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import generator_config
from diffusers import WanTransformer3DModel
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from vipo.generators import GeneratorError, load_generator
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.starting import checkpoint_inputs

ROOT = Path(__file__).resolve().parents[2]
_QUERY = "diffusion_model.blocks.0.self_attn.q"


def _pair(name: str, width: int = 24, *, kohya: bool = False) -> dict[str, Tensor]:
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    drawn = torch.Generator().manual_seed(0)
    shapes = {down: (2, width), up: (width, 2)}
    return {f"{name}.{side}.weight": torch.randn(shape, generator=drawn) / 10 for side, shape in shapes.items()}


def _wan(folder: Path, **changes: object) -> PipelineGenerator:
    found = load_generator(generator_config("wan", folder, **changes), ROOT)
    assert isinstance(found, PipelineGenerator)
    return found


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "transformer.blocks.0.attn1.to_q.dora_scale",
            r"more than a LoRA, or none \(.*dora_scale\): DoRA's dora_scale, LoKr, LoHa",
        ),
        (f"{_QUERY}.lokr_w1", r"more than a LoRA, or none \(.*lokr_w1\)"),
        (f"{_QUERY}.hada_w1_a", r"more than a LoRA, or none \(.*hada_w1_a\)"),
        (
            "diffusion_model.blocks.0.norm3.diff",
            r"beside its LoRA that the stock pipeline leaves out \(.*norm3\.diff\)",
        ),
        ("diffusion_model.blocks.0.norm3.diff_b", r"leaves out \(.*norm3\.diff_b\)"),
        ("diffusion_model.blocks.0.modulation.diff", r"leaves out \(.*modulation\.diff\)"),
        ("diffusion_model.patch_embedding.diff", r"leaves out \(.*patch_embedding\.diff\)"),
        ("text_embedding_projection.aggregate_embed.lora_A.weight", r"what connects them \(text_embedding_projection"),
        ("connectors.text_proj_in.lora_A.weight", r"what connects them \(connectors\.text_proj_in"),
    ],
)
def test_what_would_be_left_out_is_named(name: str, told: str, tiny_wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    # Under Wan's own names diffusers tells of dora_scale, under its own it does not.
    pair = _pair("transformer.blocks.0.attn1.to_q" if name.startswith("transformer.") else _QUERY)
    save_file(pair | {name: torch.ones(24)}, file)
    with pytest.raises(GeneratorError, match=rf"lora\.safetensors: .*{told}"):
        _wan(tiny_wan, start=str(file))


def test_differences_of_biases_are_merged_and_empty_ones_left_out(tiny_wan: Path, tmp_path: Path) -> None:
    file, bias = tmp_path / "lora.safetensors", torch.linspace(-1, 1, 24)
    pair = _pair(_QUERY)
    zeros = {f"diffusion_model.blocks.0.norm3.{end}": torch.zeros(24) for end in ("diff", "diff_b")}
    save_file(pair | zeros | {f"{_QUERY}.diff_b": bias}, file)
    before = dict(_wan(tiny_wan).network.named_parameters())
    after = dict(_wan(tiny_wan, start=str(file), start_scale=0.5).network.named_parameters())
    weight, own = "blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_q.bias"
    adds = {weight: pair[f"{_QUERY}.lora_B.weight"] @ pair[f"{_QUERY}.lora_A.weight"], own: bias}
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] + 0.5 * adds.get(name, torch.zeros(())), atol=1e-6, rtol=0)


_PROJECTION = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.mark.parametrize(
    ("family", "tensors", "told"),
    [
        # Beside names of diffusers, kohya's are passed over.
        (
            "flux",
            _pair("transformer.transformer_blocks.0.attn.to_q") | _pair(_PROJECTION, kohya=True),
            "of {held} rows .* reads {read}",
        ),
        ("flux", _pair(_PROJECTION, kohya=True) | {f"{_PROJECTION}.diff_b": torch.ones(24)}, r"leaves out \(.*diff_b"),
        (
            "ltx2",
            _pair("transformer.transformer_blocks.0.attn1.to_q") | _pair("transformer_blocks.0.attn1.to_k"),
            "of {held} rows .* reads {read}",
        ),
        # A warning alone.
        (
            "flux2_klein",
            _pair(_PROJECTION, kohya=True) | _pair("lora_unet_nothing_that_is_known", kohya=True),
            "of {held} rows .* reads {read}",
        ),
    ],
)
def test_names_that_diffusers_passes_over_are_counted(
    family: str, tensors: dict[str, Tensor], told: str, tmp_path: Path
) -> None:
    row, file = FAMILIES[family], tmp_path / "lora.safetensors"
    folder = row.write(tmp_path / family)
    network: Any = load_generator(row.config(folder), ROOT).network
    block = network.transformer_blocks[0]
    width = (block.attn1 if family == "ltx2" else block.attn).to_q.in_features
    fitted = {
        name: torch.ones([width if side == 24 else side for side in value.shape]) for name, value in tensors.items()
    }
    save_file(fitted, file)
    told = told.format(held=2 * width, read=width)
    with pytest.raises(GeneratorError, match=rf"lora\.safetensors: .*{told}"):
        load_generator(row.config(folder, start=str(file)), ROOT)


_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {"rank_pattern": {"attn1.to_q": 4}, "alpha_pattern": {r"blocks\.0\.attn1\.to_q": 3.0}},
}


@pytest.mark.parametrize("name", _ADAPTERS)
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(name: str, tiny_wan: Path, tmp_path: Path) -> None:
    """Its folder, or the file in it; a pipeline's trained network, wrapped and saved as Flow-GRPO does."""
    network = WanTransformer3DModel.from_pretrained(tiny_wan / "transformer")
    options = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0"], **_ADAPTERS[name])
    torch.manual_seed(0)
    adapted = get_peft_model(network, options)
    for tensor, value in adapted.named_parameters():
        if "lora_B" in tensor:
            torch.nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = dict(adapted.merge_and_unload().named_parameters())
    for start in ("adapter", "adapter/adapter_model.safetensors"):
        found = _wan(tiny_wan, start=str(tmp_path / start))
        for tensor, value in found.network.named_parameters():
            torch.testing.assert_close(value, expected[tensor], atol=1e-6, rtol=0)
        config = generator_config("wan", tiny_wan, start=str(tmp_path / start))
        # What says how strong it is decides the result too.
        assert checkpoint_inputs(config, ROOT)[1:] == [tmp_path / "adapter"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, r"use_dora True: is more than a LoRA; merge it with peft's merge_and_unload"),
        ({"bias": "all"}, r"bias 'all': is more than a LoRA"),
        ({"modules_to_save": ["proj_out"]}, r"modules_to_save \['proj_out'\]: is more than a LoRA"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa': .* weights that are not the checkpoint's"),
        ({"peft_type": "LOHA"}, r"is no LoRA's \(peft_type LORA"),
    ],
)
def test_an_adapter_of_peft_that_is_more_than_a_lora_is_refused(
    changes: dict[str, Any], told: str, tiny_wan: Path, tmp_path: Path
) -> None:
    save_file(_pair("base_model.model.blocks.0.attn1.to_q"), tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True, "r": 2, "lora_alpha": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(GeneratorError, match=rf"adapter_config\.json: {told}"):
        _wan(tiny_wan, start=str(tmp_path))


def test_an_adapter_of_peft_without_its_strength_is_refused(tmp_path: Path) -> None:
    """FLUX.2's stock pipeline reads its names, and not its alpha."""
    row = FAMILIES["flux2_klein"]
    folder, file = row.write(tmp_path / "flux2"), tmp_path / "adapter" / "renamed.safetensors"
    network: Any = load_generator(row.config(folder), ROOT).network
    width = network.transformer_blocks[0].attn.to_q.in_features
    file.parent.mkdir()
    save_file(_pair("base_model.model.double_blocks.0.img_attn.proj", width), file)
    (file.parent / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 16}))
    with pytest.raises(GeneratorError, match=r"renamed\.safetensors: is an adapter as peft saves it .*strength"):
        load_generator(row.config(folder, start=str(file)), ROOT)


@pytest.mark.parametrize("alpha", [2, 6])
def test_alpha_in_the_files_metadata_counts_without_a_stock_loader(alpha: int, tmp_path: Path) -> None:
    """HunyuanVideo 1.5's pipeline has no `load_lora_weights`."""
    row, file = FAMILIES["hunyuan_video"], tmp_path / "lora.safetensors"
    folder = row.write(tmp_path / "hunyuan")
    before: Any = load_generator(row.config(folder), ROOT).network
    width = before.transformer_blocks[0].attn.to_q.in_features
    pair = _pair("transformer.transformer_blocks.0.attn.to_q", width)
    settings = {"transformer.r": 2, "transformer.lora_alpha": alpha, "transformer.target_modules": ["attn.to_q"]}
    save_file(pair, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    after: Any = load_generator(row.config(folder, start=str(file)), ROOT).network
    up, down = (pair[f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight"] for side in "BA")
    changed = after.transformer_blocks[0].attn.to_q.weight - before.transformer_blocks[0].attn.to_q.weight
    torch.testing.assert_close(changed, up @ down * alpha / 2, atol=1e-6, rtol=0)
