"""Wan 2.2 A14B's two transformers: which acts, which is trained, and what a batch of several noise levels gives."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import generator_config, write_wan22_a14b
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import OTHER_FAMILY
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from vipo.config.compose import load_config
from vipo.config.training import LoraConfig
from vipo.generators import GeneratorError, load_generator
from vipo.generators.lora import check_adapted
from vipo.generators.original import original_state
from vipo.generators.original_names import NAMES
from vipo.generators.outline import longest_conditioning, outline
from vipo.generators.sharded import blocks
from vipo.generators.starting import checkpoint_inputs
from vipo.generators.wan import Wan22PairGenerator
from vipo.handover.comfyui import write_comfyui
from vipo.handover.usage import usage_example
from vipo.training.plan import plan
from vipo.training.sharding import join_alone, shard

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan22_a14b(tmp_path_factory.mktemp("pair") / "wan")


def _load(folder: Path, **changes: object) -> Wan22PairGenerator:
    found = load_generator(generator_config("wan22_a14b", folder, frames=5, **changes), ROOT)
    assert isinstance(found, Wan22PairGenerator)
    return found


def _given(generator: Wan22PairGenerator, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(0)
    words, negative = (torch.randn(rows, 16, 32, generator=drawn) for _ in range(2))
    noise = torch.randn(rows, *generator.latent_shape, generator=drawn)
    return noise, {"encoder_hidden_states": words, "negative_encoder_hidden_states": negative}


def test_each_level_has_its_network_and_its_scale_in_any_batch(folder: Path) -> None:
    """Against the networks called one by one: 0.875 itself is the first one's, as in the stock pipeline."""
    generator = _load(folder, guidance_scale_2=2.0)
    levels = [1.0, 0.9, 0.875, 0.87, 0.1]
    noise, given = _given(generator, len(levels))
    with torch.no_grad():
        found = generator.predict(noise, torch.tensor(levels), given)
        for row, level in enumerate(levels):
            network, scale = (
                (generator.network.transformer, 4.0) if level >= 0.875 else (generator.network.transformer_2, 2.0)
            )
            one = slice(row, row + 1)
            negative, wanted = (
                network(noise[one], torch.tensor([1000 * level]), given[f"{name}encoder_hidden_states"][one])[0]
                for name in ("negative_", "")
            )
            torch.testing.assert_close(found[one], negative + scale * (wanted - negative), atol=1e-5, rtol=0)
        # Not by a neighbour's level.
        first = generator.predict(noise, torch.ones(len(levels)), given)[:1]
    assert torch.equal(first, found[:1])


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("experts", ["high_noise", "low_noise"])
def test_one_alone_is_trained_and_saved(experts: str, mode: str, folder: Path, tmp_path: Path) -> None:
    generator = _load(folder, experts=experts)
    trained = "transformer" if experts == "high_noise" else "transformer_2"
    if mode == "lora":
        generator.add_lora(LoraConfig(rank=2), seed=0)
    else:
        generator.network.requires_grad_(True)
    grads = {name for name, value in generator.network.named_parameters() if value.requires_grad}
    assert grads
    assert all(name.startswith(f"{trained}.") for name in grads)
    noise, given = _given(generator, 1)
    # Where the other one acts there is a gradient too, of zeros: other processes have theirs.
    for level in (1.0, 0.5):
        generator.predict(noise, torch.tensor([level]), given).sum().backward()
        acts = (level >= 0.875) == (trained == "transformer")
        values = [value.grad for name, value in generator.network.named_parameters() if name in grads]
        assert all(value is not None for value in values)
        assert any(bool(value.any()) for value in values if value is not None) == acts
        generator.network.zero_grad()
    with torch.no_grad():
        for name, value in generator.network.named_parameters():
            if name in grads:
                value.add_(0.02)
        expected = generator.predict(noise, torch.tensor([0.5]), given), generator.predict(noise, torch.ones(1), given)
    generator.save_network(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    second = "_2" if experts == "low_noise" else ""
    assert files == [f"pytorch_lora_weights{second}.safetensors" if mode == "lora" else trained]
    if mode == "lora":
        with safe_open(tmp_path / files[0], "pt") as stream:
            # As the stock pipeline's load_into_transformer_2 wants it.
            assert all(name.startswith("transformer.blocks.") for name in stream.keys())  # noqa: SIM118
    again = _load(folder, experts=experts)
    again.load_network(tmp_path)
    check_adapted(again, LoraConfig().targets, tmp_path)
    with torch.no_grad():
        found = again.predict(noise, torch.tensor([0.5]), given), again.predict(noise, torch.ones(1), given)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("experts", ["both", "low_noise"])
def test_adapters_are_fp32_beside_bf16_weights(experts: str, folder: Path, tmp_path: Path) -> None:
    """Of both, when they are added and when they are loaded."""
    held = {"precision": "bf16", "weights": "bf16", "experts": experts}
    generator, again = _load(folder, **held), _load(folder, **held)
    generator.add_lora(LoraConfig(rank=2, alpha=2.0), seed=0)
    with torch.no_grad():
        for value in generator.network.parameters():
            # No number of bf16.
            value.add_(1e-3 / 3 if value.requires_grad else 0)
    generator.save_network(tmp_path)
    again.load_network(tmp_path)
    for found in (generator, again):
        assert len(found.networks) == (2 if experts == "both" else 1)
        for network in found.networks.values():
            weights = {name: value for name, value in network.named_parameters() if name.endswith("weight")}
            types = {
                (".lora_" in name, value.dtype) for name, value in weights.items() if re.search(r"\.to_[qkv]", name)
            }
            assert types == {(True, torch.float32), (False, torch.bfloat16)}
    trained = {name: value for name, value in generator.network.named_parameters() if ".lora_" in name}
    loaded = dict(again.network.named_parameters())
    assert trained
    # The adapter's name is peft's own.
    assert all(torch.equal(loaded[name.replace(".default.", ".default_0.")], value) for name, value in trained.items())


@pytest.mark.parametrize("levels", [(1.0, 0.9), (0.87, 0.1), (1.0, 0.1)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_sharded_by_blocks_the_gradients_are_the_same(
    recomputed: bool, levels: tuple[float, float], folder: Path
) -> None:
    """Of zeros too, where one does not act: it is not called, and so not gathered."""
    whole, sharded = _load(folder), _load(folder)
    noise, given = _given(whole, 2)
    called, found = set(), list[dict[str, Tensor]]()
    for generator in (whole, sharded):
        if recomputed:
            generator.recompute_activations()
        generator.network.requires_grad_(True)
    units = blocks(sharded.network)
    assert [type(unit).__name__ for unit in units] == ["WanTransformerBlock"] * 4
    for name in ("transformer", "transformer_2"):
        block = getattr(sharded.network, name).blocks[0]
        block.register_forward_hook(lambda *_, name=name: called.add(name))
    join_alone(torch.device("cpu"))
    shard(sharded.network, torch.device("cpu"), 1, "fp32", offload=False)
    assert all(isinstance(unit, FSDPModule) for unit in units)
    for generator in (whole, sharded):
        generator.predict(noise, torch.tensor(levels), given).square().mean().backward()
        grads = {name: value.grad for name, value in generator.network.named_parameters()}
        assert all(grad is not None for grad in grads.values())
        found.append({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items() if g is not None})
    dist.destroy_process_group()
    assert called == {"transformer" if level >= 0.875 else "transformer_2" for level in levels}
    for name, grad in found[0].items():
        assert bool(grad.any()) <= (name.split(".")[0] in called)
        torch.testing.assert_close(found[1][name], grad, atol=1e-7, rtol=1e-5)


def test_sharded_in_bf16_the_boundary_is_not_rounded(folder: Path) -> None:
    """0.8745 is below it, and in bf16 above."""
    generator = _load(folder, precision="bf16")
    noise, given = _given(generator, 1)
    calls: list[str] = []
    for name in ("transformer", "transformer_2"):
        getattr(generator.network, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    join_alone(torch.device("cpu"))
    shard(generator.network, torch.device("cpu"), 1, "bf16", offload=False)
    with torch.no_grad():
        generator.predict(noise, torch.tensor([0.8745]), given)
    dist.destroy_process_group()
    assert calls == ["transformer_2"]


def test_a_plan_counts_the_one_that_acts(folder: Path) -> None:
    """In a rollout all samples have one noise level; in an update of several samples, both may act."""
    fake, operations = FakeTensorMode(allow_non_fake_inputs=True), []
    generator = outline(generator_config("wan22_a14b", folder, frames=5), ROOT, fake, None)
    given = longest_conditioning(generator, ROOT, 2, fake)
    for one_time in (True, False):
        generator.read_no_values(one_time=one_time)
        with fake, torch.no_grad(), FlopCounterMode(display=False) as counted:
            generator.predict(torch.empty(2, *generator.latent_shape), torch.empty(2), given)
        operations.append(counted.get_total_flops())
    assert operations[1] == 2 * operations[0] > 0


def test_a_plan_counts_that_processes_in_shards_call_both(folder: Path) -> None:
    """Of one sample a call: the one that acts, unless another process's sample needs the other."""
    chosen = [*OTHER_FAMILY, "arm=grpo", "generator=wan22_a14b", f"generator.path={folder}", "generator.frames=5"]
    chosen += ["generator.device=cpu", "generator.max_sequence_length=16", "training.group_size=2"]
    chosen += ["training.micro_batch=1", "distribution.strategy=fsdp", "prompts.source=prompts.txt"]
    drawn, alone, together, shared = (
        plan(load_config([*chosen, *more]), ROOT, 2).flops
        for more in (
            ["training.trained_transitions=1", "distribution.processes=1"],
            ["training.trained_transitions=2", "distribution.processes=1"],
            ["training.trained_transitions=2", "distribution.processes=2"],
            ["training.trained_transitions=2", "distribution.processes=2", "training.transition_choice=shared"],
        )
    )
    lesson = alone - drawn
    assert together == alone + 2 * lesson
    assert shared == alone


def test_options_of_two_networks_are_refused_of_one(tiny_wan: Path, folder: Path, tmp_path: Path) -> None:
    for key, value in (("experts", "low_noise"), ("guidance_scale_2", 2.0), ("file_2", "low.safetensors")):
        with pytest.raises(GeneratorError, match=rf"generator\.{key} {value}: family 'wan' has one network"):
            load_generator(generator_config("wan", tiny_wan, file="any.safetensors", **{key: value}), ROOT)
    (tmp_path / "lora.safetensors").write_bytes(b"")
    with pytest.raises(GeneratorError, match=r"generator\.start: family 'wan22_a14b' has two networks"):
        _load(folder, start=str(tmp_path / "lora.safetensors"))


def test_each_network_may_be_in_a_file_of_its_own(folder: Path, tmp_path: Path) -> None:
    whole, files, copy = _load(folder), dict[str, str](), shutil.copytree(folder, tmp_path / "configurations")
    rules = NAMES["WanTransformer3DModel"]
    for key, part in (("file", "transformer"), ("file_2", "transformer_2")):
        network = getattr(whole.network, part)
        files[key] = str(tmp_path / f"{part}.safetensors")
        save_file(original_state(network.state_dict(), rules(network.config)), files[key])
        for weights in (copy / part).glob("*.safetensors"):
            weights.unlink()
    found = _load(copy, **files).network.state_dict()
    assert found.keys() == whole.network.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in whole.network.state_dict().items())
    swapped = _load(copy, file=files["file_2"], file_2=files["file"]).network
    assert not torch.equal(swapped.transformer.proj_out.weight, whole.network.transformer.proj_out.weight)
    assert checkpoint_inputs(generator_config("wan22_a14b", copy, frames=5, **files), ROOT) == [
        copy,
        *map(Path, files.values()),
    ]
    with pytest.raises(GeneratorError, match=r"generator\.file: family 'wan22_a14b' has two .* generator\.file_2"):
        _load(copy, file=files["file"])
    with pytest.raises(GeneratorError, match=r"generator\.file_2 'absent\.safetensors': there is no such"):
        _load(copy, file=files["file"], file_2="absent.safetensors")
    with pytest.raises(ValidationError, match="set file, the first one's, too"):
        generator_config("wan22_a14b", copy, frames=5, file_2=files["file_2"])


@pytest.mark.parametrize("experts", ["both", "low_noise", "high_noise"])
def test_the_cards_lines_give_each_expert_its_own_lora(
    experts: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock pipeline itself: of several files it takes any one, and for the first network, where none is named."""
    generator = _load(folder, experts=experts)
    lora = LoraConfig(rank=2, alpha=4.0)
    generator.add_lora(lora, seed=0)
    with torch.no_grad():
        for number, network in enumerate(generator.networks.values(), 1):
            for name, value in network.named_parameters():
                if ".lora_" in name:
                    value.add_(0.02 * number)
    generator.save_network(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    config = load_config(["experiment=demo", "arm=vipo"])
    training = config.training.model_copy(update={"lora": lora})
    config = config.model_copy(update={"generator": generator.config, "training": training})
    code = usage_example(config, "a fox", "WanPipeline", str(folder), None, files)
    monkeypatch.chdir(tmp_path)
    named: dict[str, Any] = {}
    exec(code.split("sample =")[0], named)
    for name in ("transformer", "transformer_2"):
        own, loaded = (getattr(of, name).state_dict() for of in (generator.network, named["pipeline"]))
        adapted = {key.replace(".default_0.", ".default."): value for key, value in loaded.items() if ".lora_" in key}
        assert adapted.keys() == {key for key in own if ".lora_" in key}
        for key, value in adapted.items():
            # The file's B holds the scale.
            torch.testing.assert_close(value, own[key] * (2 if ".lora_B." in key else 1))


@pytest.mark.parametrize("experts", ["both", "low_noise", "high_noise"])
def test_for_comfyui_each_file_names_its_model(experts: str, folder: Path, tmp_path: Path) -> None:
    generator = _load(folder, experts=experts)
    lora = LoraConfig(rank=2)
    generator.add_lora(lora, seed=0)
    generator.save_network(tmp_path / "weights")
    config = load_config(["experiment=demo", "arm=vipo"])
    training = config.training.model_copy(update={"lora": lora})
    config = config.model_copy(update={"generator": generator.config, "training": training})
    written = write_comfyui(config, tmp_path / "weights", tmp_path, ROOT)
    named = {"both": ("high-noise", "low-noise"), "low_noise": ("low-noise",), "high_noise": ("high-noise",)}
    assert written.levels == named[experts]
    assert [name.endswith("_2.safetensors") for name in written.names] == [
        level == "low-noise" for level in written.levels
    ]
