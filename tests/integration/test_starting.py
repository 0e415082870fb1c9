"""Checkpoints as people have them: a network in one file, a LoRA or a trained run to start from, shards, bf16."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import generator_config
from diffusers import ModelMixin, WanPipeline, WanTransformer3DModel
from families import FAMILIES
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.config.training import LoraConfig
from vipo.generators import GeneratorError, load_generator
from vipo.generators.original import original_state
from vipo.generators.original_names import NAMES, UNUSED
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.starting import checkpoint_inputs
from vipo.generators.wan import WanGenerator

ROOT = Path(__file__).resolve().parents[2]

# Of Wan's original repository, by diffusers' names.
_ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    "proj_out.": "head.head.",
    ".norm2.": ".norm3.",
}


def _original(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in _ORIGINAL.items():
        name = name.replace(ours, theirs)
    return name.replace(".scale_shift_table", ".modulation")


def _load(path: Path, **changes: object) -> PipelineGenerator:
    found = load_generator(generator_config("wan", path, **changes), ROOT)
    assert isinstance(found, PipelineGenerator)
    return found


def _weights(generator: PipelineGenerator) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in generator.network.named_parameters()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def single(tiny_wan: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder without the network's weights, and the file with them."""
    folder = shutil.copytree(tiny_wan, tmp_path / "configurations")
    [weights] = (folder / "transformer").glob("*.safetensors")
    file = tmp_path / "wan.safetensors"
    tensors = {f"model.diffusion_model.{_original(name)}": value for name, value in load_file(weights).items()}
    save_file(tensors, file)
    weights.unlink()
    return folder, file


def test_a_network_in_one_file_is_the_folders(tiny_wan: Path, single: tuple[Path, Path]) -> None:
    folder, file = single
    assert "blocks.0.norm3.weight" in " ".join(load_file(file))
    assert _same(_weights(_load(folder, file=str(file))), _weights(_load(tiny_wan)))
    assert checkpoint_inputs(generator_config("wan", folder, file=str(file)), ROOT) == [folder, file]


def test_a_file_that_does_not_hold_the_network_is_named(single: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = single
    tensors, bad = load_file(file), tmp_path / "bad.safetensors"

    def told(**changes: object) -> str:
        with pytest.raises(GeneratorError) as error:
            _load(folder, **{"file": str(bad)} | changes)
        return str(error.value)

    assert "bad.safetensors': there is no such .safetensors file" in told()
    bad.write_bytes(file.read_bytes()[:-100])
    assert "bad.safetensors: does not hold what WanTransformer3DModel" in told()
    name, query = "model.diffusion_model.head.head.bias", "model.diffusion_model.blocks.0.self_attn.q"
    one = tensors[f"{query}.weight"]
    for changed, fault in (
        ({name: None}, "missing: head.head.bias"),
        ({name: torch.ones(3)}, r"of another shape: head.head.bias \(3,\) instead of \(64,\)"),
        ({name: torch.full_like(tensors[name], float("nan"))}, "not finite: head.head.bias"),
        ({f"{query}.lora_A.weight": torch.ones(2, 24)}, "extra: blocks.0.self_attn.q.lora_A.weight"),
        ({f"{query}.weight": one.to(torch.float8_e4m3fn), f"{query}.scale_weight": torch.ones(())}, r"q.weight \(F8_"),
        ({f"{query}.weight": one.to(torch.int8)}, rf"not of floating point: {query}.weight \(I8\)"),
    ):
        save_file({key: value for key, value in (tensors | changed).items() if value is not None}, bad)
        assert re.search(f"bad.safetensors: does not hold what WanTransformer3DModel .* takes: .*{fault}", told())
    shutil.rmtree(folder / "transformer")
    assert "transformer: cannot be loaded" in told(file=str(file))


def _original_of(generator: PipelineGenerator) -> dict[str, Tensor]:
    """The network's tensors as its authors' file, or ComfyUI's, names them."""
    return original_state(
        generator.network.state_dict(), NAMES[generator.network_class.__name__](generator.network.config)
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.parts and name != "wan22_a14b"])
def test_a_network_under_its_original_names_is_read(family: str, prefix: str, tmp_path: Path) -> None:
    """Where other parts are in the file they are left alone; what is not the network's is an error in each family."""
    row = FAMILIES[family]
    folder = row.write(tmp_path / family)
    whole = load_generator(row.config(folder), ROOT)
    assert isinstance(whole, PipelineGenerator)
    original, file = _original_of(whole), tmp_path / "network.safetensors"
    beside = {"first_stage_model.a": torch.ones(1), "cond_stage_model.position_ids": torch.ones(1, dtype=torch.int64)}

    def read(changes: dict[str, Tensor | None]) -> PipelineGenerator:
        named = {f"{prefix}{key}": value for key, value in (original | changes).items() if value is not None}
        save_file(named | (beside if prefix else {}), file)
        found = load_generator(row.config(folder, file=str(file)), ROOT)
        assert isinstance(found, PipelineGenerator)
        return found

    for weights in (folder / whole.network_folder).glob("*.safetensors"):
        weights.unlink()
    unused = UNUSED.get(whole.network_class.__name__, ())
    found = read({name: torch.ones(2) for name in unused})
    assert _same(dict(found.network.state_dict()), dict(whole.network.state_dict()))
    assert _same(dict(found.network.named_buffers()), dict(whole.network.named_buffers()))
    assert not found.network.training
    # Parts of one tensor of the file, too, are written like others.
    for name, generator in (("one", whole), ("other", found)):
        generator.save_network(tmp_path / name)
    [[one], [other]] = ([*(tmp_path / name).rglob("*.safetensors")] for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    for strange in {"strange.weight", "norm_final.weight"} - original.keys() - {*unused}:
        with pytest.raises(GeneratorError, match=rf"network.safetensors: does not hold what .*: extra: {strange};"):
            read({strange: torch.ones(1)})
    last = max(name for name in original if name.endswith(".weight"))
    with pytest.raises(
        GeneratorError, match=rf"network.safetensors: does not hold what .*: missing: {re.escape(last)};"
    ):
        read({last: None})


def test_names_that_diffusers_alone_knows_are_read_by_its_converter(
    tiny_wan: Path, single: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another's adapter, whose network is none of vipo's families'."""
    monkeypatch.setattr("vipo.generators.one_file.NAMES", {})
    folder, file = single
    assert _same(_weights(_load(folder, file=str(file))), _weights(_load(tiny_wan)))
    left = {"model.diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 24)}
    save_file(load_file(file) | left, file)
    with pytest.raises(GeneratorError, match=r"extra: blocks\.0\..*lora_A"):
        _load(folder, file=str(file))


def test_a_network_whose_names_nobody_knows_says_so(
    tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unknown(ModelMixin):
        pass

    monkeypatch.setattr(WanGenerator, "network_class", Unknown)
    save_file({"a": torch.ones(1)}, tmp_path / "any.safetensors")
    with pytest.raises(GeneratorError, match=r"file: neither vipo nor diffusers knows how the files of a Unknown name"):
        _load(tiny_wan, file=str(tmp_path / "any.safetensors"))


def _lora(file: Path, names: dict[str, str], alpha: float | None = None) -> dict[str, Tensor]:
    """Write a LoRA of rank 2; gives what it adds to each weight."""
    generator, tensors, adds = torch.Generator().manual_seed(0), dict[str, Tensor](), dict[str, Tensor]()
    for module, name in names.items():
        down, up = (torch.randn(shape, generator=generator) / 10 for shape in ((2, 24), (24, 2)))
        kohya = alpha is not None
        tensors[f"{name}.{'lora_down' if kohya else 'lora_A'}.weight"] = down
        tensors[f"{name}.{'lora_up' if kohya else 'lora_B'}.weight"] = up
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        adds[f"{module}.weight"] = up @ down * (1 if alpha is None else alpha / 2)
    save_file(tensors, file)
    return adds


_MODULES = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0")


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_lora_is_merged_with_its_scale(alpha: float | None, tiny_wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    of = (lambda n: f"transformer.{n}") if alpha is None else lambda n: f"diffusion_model.{_original(f'{n}.')[:-1]}"
    adds = _lora(file, {name: of(name) for name in _MODULES}, alpha)
    before = _weights(_load(tiny_wan))
    after = _weights(_load(tiny_wan, start=str(file), start_scale=0.5))
    assert before.keys() == after.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] + 0.5 * adds.get(name, torch.zeros(())), atol=1e-6, rtol=0)
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == adds.keys()
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora(lora_scale=0.5)
    stock = dict(pipeline.transformer.named_parameters())
    for name in adds:
        merged = stock[name.replace(".weight", ".base_layer.weight")]
        torch.testing.assert_close(after[name], merged, atol=1e-6, rtol=0)


def test_a_lora_that_does_not_fit_is_named(tiny_wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    for name, message in {
        "text_encoder.block.0.q": r"lora.safetensors: adapts text encoders too, .*\(text_encoder.block.0.q.lora_A",
        "transformer.blocks.7.attn1.to_q": r"lora.safetensors: (cannot be merged|adapts no module)",
    }.items():
        _lora(file, {"x": name})
        with pytest.raises(GeneratorError, match=message):
            _load(tiny_wan, start=str(file))
    fits, beside = (f"transformer.blocks.{number}.attn1.to_q" for number in (0, 7))
    _lora(file, {"x": fits, "y": beside})
    tensors = load_file(file)
    for kept, message in (
        ([*tensors], rf"holds 4 LoRA tensors, and Wan.* takes 2 of such modules; it has no module for {beside}.lora_A"),
        (
            [name for name in tensors if name != f"{beside}.lora_B.weight"],
            r"holds 3 .* takes 2 .* no module for",
        ),
    ):
        save_file({name: tensors[name] for name in kept}, file)
        with pytest.raises(GeneratorError, match=message):
            _load(tiny_wan, start=str(file))
    _lora(file, {"x": fits, "y": fits.replace("0", "1")})
    save_file({name: value for name, value in load_file(file).items() if "1.attn1.to_q.lora_B" not in name}, file)
    with pytest.raises(GeneratorError, match=r"holds 3 LoRA tensors, and Wan.* takes 4 of such modules$"):
        _load(tiny_wan, start=str(file))
    save_file({name: value.to(torch.int8) for name, value in tensors.items() if beside not in name}, file)
    with pytest.raises(GeneratorError, match=rf"not of floating point: {fits}.lora_A.weight \(I8\)"):
        _load(tiny_wan, start=str(file))
    file.write_bytes(b"no weights")
    with pytest.raises(GeneratorError, match=r"lora.safetensors: cannot be read"):
        _load(tiny_wan, start=str(file))
    with pytest.raises(GeneratorError, match=r"start '.*missing': no LoRA file, and no trained run"):
        _load(tiny_wan, start=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"start_scale 2 has no effect"):
        generator_config("wan", tiny_wan, start_scale=2.0)


def _run(folder: Path, config: GeneratorConfig, mode: str, by: float) -> dict[str, Tensor]:
    """A trained run; gives its policy's predictions for one noise."""
    generator = load_generator(config, ROOT)
    assert isinstance(generator, PipelineGenerator)
    if mode == "lora":
        generator.add_lora(LoraConfig(rank=2, alpha=6.0), seed=0)
    else:
        generator.network.requires_grad_(True)
    with torch.no_grad():
        for value in generator.network.parameters():
            if value.requires_grad:
                value.add_(by)
    (folder / "weights").mkdir(parents=True)
    generator.save_network(folder / "weights")
    OmegaConf.save({"generator": config.model_dump(mode="json")}, folder / "config.yaml")
    return {"prediction": _prediction(generator)}


def _prediction(generator: PipelineGenerator) -> Tensor:
    noise = torch.randn(1, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    words = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = {"encoder_hidden_states": words, "negative_encoder_hidden_states": words / 2}
        return generator.predict(noise, torch.ones(1), given)


def test_a_run_is_the_base_of_another_and_so_on(tiny_wan: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "lora-s0", tmp_path / "again-s0"
    one = _run(first, generator_config("wan", tiny_wan), "lora", 0.02)["prediction"]
    started = _load(tiny_wan, start=str(first))
    assert not hasattr(started.network, "peft_config") or not started.network.peft_config
    torch.testing.assert_close(_prediction(started), one, atol=1e-5, rtol=0)
    assert not torch.equal(one, _prediction(_load(tiny_wan)))
    # A LoRA over a LoRA, read from weights/, and whole weights over both.
    config = generator_config("wan", tiny_wan, start=str(first / "weights"))
    two = _run(second, config, "lora", 0.03)["prediction"]
    torch.testing.assert_close(_prediction(_load(tiny_wan, start=str(second))), two, atol=1e-5, rtol=0)
    paths = checkpoint_inputs(generator_config("wan", tiny_wan, start=str(second)), ROOT)
    assert paths == [tiny_wan, first / "weights", second / "weights"]
    third = tmp_path / "full-s0"
    three = _run(third, generator_config("wan", tiny_wan, start=str(second)), "full", 0.01)["prediction"]
    assert torch.equal(_prediction(_load(tiny_wan, start=str(third))), three)
    (third / "updates").mkdir()
    shutil.copytree(third / "weights", third / "updates" / "000002")
    assert torch.equal(_prediction(_load(tiny_wan, start=str(third / "updates" / "000002"))), three)
    with pytest.raises(GeneratorError, match=r"start_scale 2: .* holds whole weights"):
        _load(tiny_wan, start=str(third), start_scale=2.0)
    other = shutil.copytree(tiny_wan, tmp_path / "other")
    with pytest.raises(GeneratorError, match=r"that run trained generator\.path '.*', not '.*other'"):
        _load(other, start=str(third))


@pytest.mark.parametrize("kept", ["weights", "updates/000002"])
def test_a_mean_belongs_to_its_run_too(kept: str, tiny_wan: Path, tmp_path: Path) -> None:
    """Its run started from another one, and trained this checkpoint; the run's own name stands for the last weights."""
    first, second = tmp_path / "lora-s0", tmp_path / "again-s0"
    _run(first, generator_config("wan", tiny_wan), "lora", 0.02)
    two = _run(second, generator_config("wan", tiny_wan, start=str(first)), "lora", 0.03)["prediction"]
    mean = second / kept / "ema"
    mean.mkdir(parents=True)
    [file] = (second / "weights").glob("*.safetensors")
    shutil.copyfile(file, mean / file.name)
    assert checkpoint_inputs(generator_config("wan", tiny_wan, start=str(mean)), ROOT) == [
        tiny_wan,
        first / "weights",
        mean,
    ]
    torch.testing.assert_close(_prediction(_load(tiny_wan, start=str(mean))), two, atol=1e-5, rtol=0)
    assert checkpoint_inputs(generator_config("wan", tiny_wan, start=str(second)), ROOT)[-1] == second / "weights"
    other = shutil.copytree(tiny_wan, tmp_path / "other")
    with pytest.raises(GeneratorError, match=r"that run trained generator\.path '.*', not '.*other'"):
        _load(other, start=str(mean))
    # Of whole weights, too.
    three = _run(tmp_path / "full-s0", generator_config("wan", tiny_wan), "full", 0.01)["prediction"]
    whole = shutil.copytree(tmp_path / "full-s0/weights", tmp_path / "full-s0" / kept / "ema", dirs_exist_ok=True)
    assert torch.equal(_prediction(_load(tiny_wan, start=str(whole))), three)


def test_sharded_and_bf16_weights_are_read_in_fp32(tiny_wan: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_wan, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    network = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer").to(torch.bfloat16)
    network.save_pretrained(folder / "transformer", max_shard_size="30KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    for part in ("vae", "text_encoder"):
        shutil.copytree(tiny_wan / part, folder / part, dirs_exist_ok=True)
    found = _weights(_load(folder))
    rounded = {name: value.detach().float() for name, value in network.named_parameters()}
    assert _same(found, rounded)
