"""Every family against its stock pipeline, on a tiny random checkpoint of its own layout (``tests/families.py``)."""

import contextlib
import functools
import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import edit_json, edit_tensors, faulty
from diffusers.models import attention_dispatch
from families import FAMILIES
from family import Family
from on_cuda import pretend_autocast, tensors_made
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from vipo.config.generator import GeneratorConfig
from vipo.config.sampling import SamplingConfig
from vipo.config.training import LoraConfig
from vipo.conformance.subject import PROMPTS, Mode, Subject, subject
from vipo.conformance.table import CHECKS
from vipo.generators import GeneratorError, load_generator
from vipo.generators.configured import resolve_class
from vipo.generators.counted import counted_on
from vipo.generators.embeddings import load_embeddings, stack_conditioning
from vipo.generators.encoding import encode_prompt_file
from vipo.generators.experts import Experts
from vipo.generators.outline import longest_conditioning, outline, without_data
from vipo.generators.pipeline import PipelineGenerator
from vipo.generators.sharded import blocks, load_to_shard
from vipo.prompts import Prompt
from vipo.prompts.prompt import prompt_id
from vipo.sampling.chain import sampling_chain
from vipo.training.peak import peak_bytes
from vipo.training.sharding import fill, join_alone, shard

ROOT = Path(__file__).resolve().parents[2]
# What LoRA leaves out is no matter of the family: all of its weights are counted for one of each kind of network.
WHOLE = ("flux", "sd", "wan", "sana")
# One row for each class of blocks, and one of two networks.
BLOCKS = (
    "sd",
    "sana",
    "hunyuan_video",
    "ltx2",
    "cogvideox_rotary",
    "sd3",
    "flux2_klein",
    "qwen_image",
    "qwen_image_21",
    "z_image",
    "wan22_a14b",
)
# Whose attention goes through diffusers' dispatcher.
DISPATCHED = (
    "flux",
    "flux2_dev",
    "flux2_klein",
    "hunyuan_video",
    "ltx2",
    "qwen_image",
    "qwen_image_21",
    "wan",
    "wan22_a14b",
    "wan22_ti2v",
    "z_image",
)
EXACT = {"atol": 1e-5, "rtol": 0.0}


@dataclass(frozen=True)
class Case:
    """A family's row and checkpoint, and what its stock pipeline makes of two prompts."""

    row: Family
    folder: Path
    subject: Subject

    @property
    def config(self) -> GeneratorConfig:
        """Section `generator`."""
        return self.subject.config

    def load(self, mode: Mode = "frozen", **changes: object) -> PipelineGenerator:
        """The generator, with what `mode` trains."""
        return self.subject.load(mode, **changes)


@pytest.fixture(scope="session", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    row = FAMILIES[request.param]
    folder = row.write(tmp_path_factory.mktemp("families") / request.param)
    return Case(row, folder, subject(row.config(folder), ROOT, steps=row.steps))


@pytest.mark.parametrize("check", CHECKS)
def test_it_is_the_stock_pipeline_and_trains(check: str, case: Case) -> None:
    """What `vipo check-generator` prints, see `vipo.conformance`."""
    found = CHECKS[check](case.subject)
    assert [(each.name, each.result, each.found, each.note) for each in found if each.result != "ok"] == []
    if check in ("update_lora", "update_full"):
        [unmoved] = [each.names for each in found if each.name.startswith("what an update changes")]
        generator = case.load("full" if check == "update_full" else "lora")
        trained = [name for name, value in generator.network.named_parameters() if value.requires_grad]
        assert list(unmoved) == sorted(name for name in trained if re.search(case.row.unreached, name))
        # Each of LoRA's default targets is one of the family's modules.
        if check == "update_lora":
            modules = {name.partition(".lora_")[0] for name in trained}
            assert all(any(name.endswith(f".{target}") for name in modules) for target in LoraConfig().targets)


def test_the_shift_is_that_of_the_stock_schedulers_levels(case: Case) -> None:
    generator, scheduler = case.load(), case.subject.sampled.scheduler
    if generator.prediction != "velocity":
        assert generator.flow_shift is None
        return
    shift, levels = generator.flow_shift, scheduler.sigmas
    shift = shift(len(levels) - 1) if callable(shift) else shift
    own = sampling_chain(SamplingConfig(steps=len(levels) - 1, shift=shift), "velocity").levels
    if terminal := scheduler.config.get("shift_terminal"):
        own[:-1] = 1 - (1 - own[:-1]) * (1 - terminal) / (1 - own[-2])
    if case.row.gives_levels:
        torch.testing.assert_close(own, levels, **EXACT)
    else:
        # Without levels of the pipeline's own, the scheduler spaces them from 1 to its smallest: its ends tell.
        last = shift / (1000 + shift - 1)
        assert float(levels[-2]) == pytest.approx(shift * last / (1 + (shift - 1) * last), abs=1e-5)


def test_decoding_hands_a_gradient_back_where_one_is_asked_for(case: Case) -> None:
    """What the credit source `reward` and the meter read; the pictures are the same."""
    generator, latents = case.load(), case.subject.noise.clone().requires_grad_(True)
    pictures = generator.pictures(latents, gradient=True)
    (gradient,) = torch.autograd.grad(pictures.sum(), latents)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    plain = generator.pictures(case.subject.noise)
    assert not plain.requires_grad
    assert torch.equal(plain, pictures.detach())


def test_without_data_a_call_makes_as_much_as_with_it(case: Case) -> None:
    """What `vipo plan` counts: weights, and the most bytes alive in a call with gradients and in a decoding."""
    _makes_as_much("lora", case)
    if case.row.family in WHOLE:
        _makes_as_much("full", case)


def _makes_as_much(mode: Mode, case: Case) -> None:
    generator, lora = case.load(mode), LoraConfig(rank=2, alpha=6.0) if mode == "lora" else None
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    outlined = outline(case.config, ROOT, fake, lora)
    kinds = [
        [
            (name, value.shape, value.dtype, value.requires_grad)
            for part in (each.network, each.vae)
            for name, value in (*part.named_parameters(), *part.named_buffers())
        ]
        for each in (generator, outlined)
    ]
    assert kinds[0] == kinds[1]
    longest = longest_conditioning(outlined, ROOT, 2, fake)
    wanted = {n: v for n, v in case.subject.conditioning.items() if not n.startswith("negative_") or n in longest}
    assert {name: value.shape for name, value in longest.items()} == {n: value.shape for n, value in wanted.items()}
    with fake:
        like = {name: torch.empty_like(value) for name, value in case.subject.conditioning.items()}
        given = (torch.empty_like(case.subject.noise), torch.empty(2), like)
    # What is planned is the longest prompts; of two networks, that both act.
    longest = {n: torch.ones_like(v) if n.endswith("mask") else v for n, v in case.subject.conditioning.items()}
    real = (case.subject.noise, torch.tensor([1.0, 0.7]), longest)
    found = _most_alive(contextlib.nullcontext(), generator, *real)
    assert found == pytest.approx(_most_alive(fake, outlined, *given), rel=0.02)


def test_gathered_weights_are_planned_in_bf16(case: Case) -> None:
    """As FSDP2 casts them before a call, which then makes no copies of its own."""
    fake, config = FakeTensorMode(allow_non_fake_inputs=True), case.config.model_copy(update={"precision": "bf16"})
    most = []
    for cast in (False, True):
        outlined = outline(config, ROOT, fake, None, cast=cast)
        inner = {value for block in blocks(outlined.network) for value in block.parameters()}
        for value in outlined.network.parameters():
            assert value.dtype == (torch.bfloat16 if cast and value in inner else torch.float32)
        with fake:
            given = {name: torch.empty_like(value) for name, value in case.subject.conditioning.items()}
            latents, times = torch.empty_like(case.subject.noise), torch.empty(2)
        most.append(_most_alive(fake, outlined, latents, times, given)[0])
    assert most[1] < most[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_call_is_counted_as_a_gpu_makes_it(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `vipo plan` counts on a CPU: the tensors that CUDA's autocast and kernels make of the same call."""
    pretend_autocast(monkeypatch)
    fake, config = FakeTensorMode(allow_non_fake_inputs=True), case.config.model_copy(update={"precision": precision})
    outlined, found = outline(config, ROOT, fake, None), []
    for device in (torch.device("cuda"), torch.device("cpu")):
        with fake, device:
            outlined.device = device
            for name, value in vars(outlined).items():
                setattr(
                    outlined, name, tree_map_only(Tensor, lambda each: torch.empty(each.shape, dtype=each.dtype), value)
                )
            without_data(outlined.network)
            given = {name: torch.empty(value.shape) for name, value in case.subject.conditioning.items()}
            predict = functools.partial(outlined.predict, torch.empty(case.subject.noise.shape), torch.empty(2), given)
        with fake, contextlib.nullcontext() if device.type == "cuda" else counted_on("cuda:1"):
            # Rotary angles are made once and kept.
            predict()
            found.append(tensors_made(predict))
    assert found[0] == found[1]


def test_sharded_in_bf16_it_predicts_as_well_as_whole(case: Case) -> None:
    """Against fp32, at a noise level that bf16 rounds; what FSDP2 gathers in bf16 is what autocast rounds, nearly."""
    whole, rounded, sharded = (case.load(precision=precision) for precision in ("fp32", "bf16", "bf16"))
    join_alone(torch.device("cpu"))
    shard(sharded.network, torch.device("cpu"), 1, "bf16", offload=False)
    levels = torch.tensor([0.9037, 0.8745]) if whole.prediction == "velocity" else torch.tensor([903, 627])
    with torch.no_grad():
        right, *others = (
            each.predict(case.subject.noise, levels, case.subject.conditioning) for each in (whole, rounded, sharded)
        )
    dist.destroy_process_group()
    plain, found = (float((other - right).square().mean().sqrt()) for other in others)
    assert 0 < found < 2 * plain


def test_a_network_that_is_loaded_to_be_sharded_predicts_the_same(case: Case) -> None:
    """As a process of FSDP2 has it, without weights until it is given the first process's."""
    device, levels = torch.device("cpu"), case.subject.sampled.times(case.load())
    whole = load_to_shard(case.config, ROOT, whole=True).network.state_dict()
    sharded = load_to_shard(case.config, ROOT, whole=False)
    join_alone(device)
    shard(sharded.network, device, 1, "fp32", offload=False)
    fill(sharded.network, device, whole, offload=False)
    with torch.no_grad():
        right, found = (
            each.predict(case.subject.noise, levels, case.subject.conditioning) for each in (case.load(), sharded)
        )
    dist.destroy_process_group()
    torch.testing.assert_close(found, right, **EXACT)


def _most_alive(
    mode: contextlib.AbstractContextManager[Any], generator: Any, latents: Tensor, times: Tensor, given: Any
) -> list[int]:
    def learn() -> None:
        generator.predict(latents, times, given).square().mean().backward()

    known = [latents, times, *given.values()]
    return [
        peak_bytes(mode, [generator.network, generator.vae], known, call)
        for call in (learn, lambda: generator.pictures(latents))
    ]


def test_prompts_are_encoded_apart_and_the_negative_one_is_stored_once(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [Prompt(prompt_id(text), text, {}) for text in PROMPTS]
    source = tmp_path / "eval.jsonl"
    source.write_text("".join(json.dumps(vars(prompt)) + "\n" for prompt in prompts))
    encode_prompt_file(case.config, ROOT, source, tmp_path / "eval.safetensors", {})
    assert "other tokens" not in caplog.text
    widths = resolve_class(case.config).conditioning_widths(case.config, ROOT)
    loaded = load_embeddings(tmp_path / "eval.safetensors", prompts, widths=widths)
    found = stack_conditioning(loaded, [prompt.id for prompt in prompts])
    assert found.keys() == case.subject.conditioning.keys()
    assert all(torch.equal(found[name], value) for name, value in case.subject.conditioning.items())
    for name, value in found.items():
        assert torch.equal(value[0], value[1]) == name.startswith("negative_") or name.endswith("mask"), name


def test_prompts_read_together_are_those_read_apart_within_rounding(case: Case) -> None:
    """And fewer calls are made of the encoders; the negative prompt has its own."""
    texts = [*PROMPTS, "a", "a red fox beside a blue box in the snow, seen from far away", ""]
    calls, found = [0, 0], []

    def count(module: Any, *_: Any) -> None:
        calls[-1] += isinstance(module, PreTrainedModel)

    for number, batch in enumerate((1, 3)):
        config = case.config.model_copy(update={"encoder_batch": batch})
        with register_module_forward_hook(count):
            found.append(resolve_class(config).encode_prompts(config, ROOT, texts))
        calls = calls if number else [calls[-1], 0]
    assert 0 < calls[1] < calls[0]
    for apart, together in zip(*found, strict=True):
        assert apart.keys() == together.keys()
        for name, value in apart.items():
            torch.testing.assert_close(together[name], value, atol=1e-5, rtol=1e-5)


def test_every_frame_of_a_video_is_some_latent_frames(case: Case) -> None:
    generator, frames = case.load(), case.config.frames
    if frames is None:
        assert generator.frame_groups is None
        return
    groups = generator.frame_groups
    assert groups is not None
    assert len(groups) == generator.latent_shape[1]
    # In order, and none is empty: one that is not decoded (CogVideoX 1.5) has its neighbour's.
    assert sorted({frame for group in groups for frame in group}) == list(range(frames))
    assert all(groups)
    assert [group.start for group in groups] == sorted(group.start for group in groups)


def test_what_is_sharded_over_processes_is_a_block_of_the_network(case: Case) -> None:
    network: Any = case.load().network
    if isinstance(network, Experts):
        # Processes whose samples need different ones must gather the same: both, as a whole.
        network = network.transformer
    held = blocks(network)
    assert len(held) > 1
    assert network not in held


def test_its_blocks_can_be_compiled_whole_and_compute_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without a break, with an adapter, and recomputed: predictions and gradients keep their bits."""
    if case.folder.name not in BLOCKS:
        pytest.skip("another row has its blocks")
    sound = nn.Module.compile
    traced = {"backend": "eager", "fullgraph": True, "dynamic": False}
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: sound(module, **traced))
    torch._dynamo.reset()
    time, found = case.subject.sampled.times(case.load()), []
    for mode in ("none", "blocks"):
        generator = case.load("lora", precision="bf16", compile=mode)
        generator.recompute_activations()
        with torch.no_grad():
            sampled = generator.predict(case.subject.noise, time, case.subject.conditioning)
        learned = generator.predict(case.subject.noise, time, case.subject.conditioning)
        assert torch.equal(sampled, learned)
        learned.square().mean().backward()
        found.append([sampled, *(value.grad for value in generator.network.parameters() if value.requires_grad)])
    torch._dynamo.reset()
    compiled = [module for module in generator.network.modules() if module._compiled_call_impl is not None]
    assert len(compiled) > 1
    for value, expected in zip(*found, strict=True):
        assert value is expected is None or torch.equal(value, expected)


def test_an_attention_backend_is_set_everywhere_or_refused_by_name(case: Case) -> None:
    """And for this network alone. `_native_math` is PyTorch's explicit attention."""
    if case.row.family not in DISPATCHED:
        with pytest.raises(
            GeneratorError, match=rf"attention '_native_math' would change nothing: .*{case.row.family}"
        ):
            # Before weights are read.
            resolve_class(case.config).check(case.config.model_copy(update={"attention": "_native_math"}), ROOT)
        return
    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    generator = case.load(attention="_native_math")
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before
    processors = [module.processor for module in generator.network.modules() if hasattr(module, "processor")]
    # HunyuanVideo's reader of the prompt has one of its own.
    chosen = [each._attention_backend.value for each in processors if hasattr(each, "_attention_backend")]
    assert set(chosen) == {"_native_math"}
    assert len(processors) - len(chosen) == (case.row.family == "hunyuan_video")
    time = case.subject.sampled.times(generator)
    with torch.no_grad():
        found = generator.predict(case.subject.noise, time, case.subject.conditioning)
    torch.testing.assert_close(found, case.subject.sampled.prediction, atol=1e-4, rtol=1e-4)


def _encode(config: GeneratorConfig, root: Path) -> list[dict[str, Tensor]]:
    return resolve_class(config).encode_prompts(config, root, ["a fox"])


def test_a_tensor_that_a_part_lacks_or_does_not_take_is_named(case: Case, tmp_path: Path) -> None:
    for part in case.row.parts:
        folder = shutil.copytree(case.folder, tmp_path / part)
        faults: list[str] = []
        edit_tensors(folder / part, lambda tensors, faults=faults: faults.extend(faulty(tensors)))
        config = case.row.config(folder)
        read = _encode if part.startswith(("text", "connectors")) else load_generator
        with pytest.raises(GeneratorError) as told:
            read(config, ROOT)
        assert f"/{part}: does not hold what" in str(told.value)
        for fault in faults:
            kind, _, name = fault.partition(": ")
            # Some libraries know a tensor by another name than its file does.
            assert f"{kind}: " in str(told.value)
            assert ".".join(name.split(".")[-2:]) in str(told.value)


def test_what_the_adapter_does_not_hold_is_named_before_weights_are_read(case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    for file, changes, message in case.row.refused:
        before = (folder / file).read_text()
        edit_json(folder / file, **changes)
        with pytest.raises(GeneratorError, match=message):
            load_generator(case.row.config(folder), ROOT)
        (folder / file).write_text(before)


def test_an_odd_setting_is_refused_or_computed_with(case: Case, tmp_path: Path) -> None:
    """Ten keys of the configurations, each with a value drawn for it: no error but ours, whichever call meets it."""
    if not case.row.parts:
        pytest.skip("another row has its configurations")
    folder, drawn = shutil.copytree(case.folder, tmp_path / "odd"), random.Random(case.folder.name)
    parts = {"scheduler", *case.row.parts} - {"text_encoder", "text_encoder_2", "text_encoder_3"}
    files = [path for part in sorted(parts) for path in sorted((folder / part).glob("*config.json"))]
    keys = [(path, key) for path in files for key in json.loads(path.read_text()) if not key.startswith("_")]
    for path, key in drawn.sample(keys, 10):
        before, value = path.read_text(), drawn.choice([None, "x", -1, 0, 0.5, [], {}, True])
        edit_json(path, **{key: value})
        with contextlib.suppress(GeneratorError), torch.no_grad():
            generator = load_generator(case.row.config(folder), ROOT)
            latents = torch.zeros(2, *generator.latent_shape)
            time = torch.ones(2) if generator.prediction == "velocity" else torch.tensor([900, 500])
            generator.predict(latents, time, case.subject.conditioning)
            generator.pictures(latents)
        path.write_text(before)


def test_what_the_chain_and_the_network_leave_out_is_told(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.load()
    told = " ".join(record.getMessage() for record in caplog.records)
    terminal = case.subject.sampled.scheduler.config.get("shift_terminal")
    assert ("stretches its noise levels to end at 0.02" in told) == (terminal is not None)
    assert ("guidance_scale 4.0 has no effect" in told) == bool(_index(case).get("is_distilled"))


def _index(case: Case) -> dict[str, object]:
    return dict(json.loads((case.folder / "model_index.json").read_text()))


def test_settings_that_do_not_fit_are_named(case: Case) -> None:
    for changes, message in case.row.misfits:
        with pytest.raises(GeneratorError, match=message):
            case.load(**changes)
    for key in ("height", "width"):
        with pytest.raises(GeneratorError, match=rf"generator\.{key} 47 is not a multiple of"):
            case.load(**{key: 47})
    video = case.config.frames is not None
    with pytest.raises(GeneratorError, match=r"generator\.frames .*makes " + ("videos: set" if video else "pictures")):
        case.load(frames=None if video else 5)
    if video:
        with pytest.raises(GeneratorError, match=r"generator\.frames 8 is not of the form 1 \+ \d k"):
            case.load(frames=8)
