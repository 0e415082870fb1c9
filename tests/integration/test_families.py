"""Every family against its stock pipeline, on a tiny random checkpoint of its own layout (``tests/families.py``)."""

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, edit_tensors, faulty
from families import FAMILIES
from family import PROMPTS, Family, Sampled, log_ratios, loss_of, optimizer_of, training_chain
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vipo.config.generator import GeneratorConfig
from vipo.config.sampling import SamplingConfig
from vipo.config.training import LoraConfig
from vipo.generators import Generator, GeneratorError, load_generator
from vipo.generators.base import resolve_class
from vipo.generators.embeddings import load_embeddings, stack_conditioning
from vipo.generators.encoding import encode_prompt_file
from vipo.generators.outline import longest_conditioning, outline
from vipo.prompts import Prompt
from vipo.prompts.prompt import prompt_id
from vipo.sampling.chain import sampling_chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import Trajectory, rollout, sample_ode
from vipo.training.plan import peak_bytes

ROOT = Path(__file__).resolve().parents[2]
MODES = pytest.mark.parametrize("mode", ["lora", "full"])
EXACT = {"atol": 1e-5, "rtol": 0.0}


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, and what its stock pipeline makes of two prompts."""

    row: Family
    folder: Path
    config: GeneratorConfig
    noise: Tensor
    conditioning: Mapping[str, Tensor]
    sampled: Sampled

    def load(self, mode: str = "frozen", **changes: object) -> Generator:
        """The generator, with what `mode` trains."""
        generator = load_generator(self.row.config(self.folder, **changes), ROOT)
        if mode == "lora":
            generator.add_lora(LoraConfig(rank=2, alpha=6.0), seed=0)
        elif mode == "full":
            generator.network.requires_grad_(True)
        return generator


@pytest.fixture(scope="session", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    row = FAMILIES[request.param]
    folder = row.write(tmp_path_factory.mktemp("families") / request.param)
    config = row.config(folder)
    rows = resolve_class(config).encode_prompts(config, ROOT, PROMPTS)
    conditioning = {name: torch.stack([each[name] for each in rows]) for name in rows[0]}
    noise = keyed_normal([(0, "test", i) for i in range(2)], load_generator(config, ROOT).latent_shape)
    return Case(row, folder, config, noise, conditioning, row.sample(row.stock(folder), config, noise))


def test_prediction_and_sample_are_the_stock_pipelines(case: Case) -> None:
    generator, sampled = case.load(), case.sampled
    expected, time = sampled.own_prediction(generator, case.noise)
    with torch.no_grad():
        torch.testing.assert_close(generator.predict(case.noise, time, case.conditioning), expected, **EXACT)
    found = generator.pictures(sample_ode(generator, case.conditioning, sampled.chain(generator), case.noise))
    torch.testing.assert_close(found, sampled.pictures, **EXACT)
    assert float(found.std()) > 0


def test_the_shift_is_that_of_the_stock_schedulers_levels(case: Case) -> None:
    generator, scheduler = case.load(), case.sampled.scheduler
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


def _path(generator: Generator, case: Case) -> tuple[Trajectory, Tensor]:
    chain = training_chain(generator, 4)
    keys = [(0, "key", i) for i in range(2)]
    return rollout(generator, case.conditioning, chain, chain.trainable, keys, keys), torch.tensor([0, 2])


def _step(generator: Generator, optimizer: torch.optim.Optimizer, path: Trajectory, steps: Tensor, case: Case) -> float:
    log_ratio = log_ratios(generator, case.conditioning, path, steps, training_chain(generator, 4))
    loss_of(log_ratio).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(log_ratio.detach().abs().max())


@MODES
def test_an_update_changes_what_is_trained_and_nothing_else(mode: str, case: Case) -> None:
    generator = case.load(mode)
    before = {name: value.detach().clone() for name, value in generator.network.named_parameters()}
    frozen = [value.clone() for value in generator.vae.parameters()]
    path, steps = _path(generator, case)
    optimizer = optimizer_of(generator)
    assert _step(generator, optimizer, path, steps, case) < 1e-5
    saved = {name: value.detach().clone() for name, value in generator.network.named_parameters()}
    state = json.loads(json.dumps(optimizer.state_dict()["param_groups"]))
    moments = {key: {n: v.clone() for n, v in row.items()} for key, row in optimizer.state_dict()["state"].items()}
    assert _step(generator, optimizer, path, steps, case) > 1e-5
    after = dict(generator.network.named_parameters())

    adapted = re.compile(r"\.lora_[AB]\." if mode == "lora" else "")
    trained = {name for name in before if adapted.search(name)}
    assert trained == {name for name, value in after.items() if value.requires_grad}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    unreached = {name for name in trained if re.search(case.row.unreached, name)}
    assert sorted(trained - changed) == sorted(unreached)
    assert changed <= trained
    assert all(torch.equal(a, b) for a, b in zip(generator.vae.parameters(), frozen, strict=True))
    if mode == "lora":
        modules = {name.partition(".lora_")[0] for name in trained}
        ends = tuple(f".{target}" for target in LoraConfig().targets)
        assert modules == {n for n, _ in generator.network.named_modules() if n.endswith(ends) and n in modules}
        assert {f".{target}" for target in LoraConfig().targets} == {e for e in ends for n in modules if n.endswith(e)}

    resumed = case.load(mode)
    resumed.network.load_state_dict(saved, strict=False)
    again = optimizer_of(resumed)
    again.load_state_dict({"state": moments, "param_groups": state})
    _step(resumed, again, path, steps, case)
    assert all(torch.equal(value, after[name]) for name, value in resumed.network.named_parameters())


def _gradients(
    generator: Generator, case: Case, path: Trajectory, steps: Tensor, rows: list[list[int]]
) -> list[Tensor]:
    chain = training_chain(generator, 4)
    for part in rows:
        given = {name: value[part] for name, value in case.conditioning.items()}
        log_ratio = log_ratios(generator, given, path.select(torch.tensor(part)), steps[part], chain)
        (loss_of(log_ratio) / len(rows)).backward()
    found = [value.grad for value in generator.network.parameters() if value.grad is not None]
    generator.network.zero_grad(set_to_none=True)
    return [value for value in found if value is not None]


def test_gradients_are_the_same_recomputed_and_by_halves(case: Case) -> None:
    """Recomputed: gradient checkpointing. By halves: each process's share of the samples, averaged."""
    generator = case.load("full")
    path, steps = _path(generator, case)
    whole = _gradients(generator, case, path, steps, [[0, 1]])
    halves = _gradients(generator, case, path, steps, [[0], [1]])
    generator.recompute_activations()
    recomputed = _gradients(generator, case, path, steps, [[0, 1]])
    scale = max(float(value.abs().max()) for value in whole)
    assert scale > 0
    for one, two, three in zip(whole, halves, recomputed, strict=True):
        torch.testing.assert_close(three, one, atol=1e-6 * scale, rtol=0)
        torch.testing.assert_close(two, one, atol=1e-4 * scale, rtol=0)
    assert any(getattr(module, "gradient_checkpointing", False) for module in generator.network.modules())


def test_decoding_hands_a_gradient_back_where_one_is_asked_for(case: Case) -> None:
    """What the credit source `reward` and the meter read; the pictures are the same."""
    generator, latents = case.load(), case.noise.clone().requires_grad_(True)
    pictures = generator.pictures(latents, gradient=True)
    (gradient,) = torch.autograd.grad(pictures.sum(), latents)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    plain = generator.pictures(case.noise)
    assert not plain.requires_grad
    assert torch.equal(plain, pictures.detach())


def test_bf16_is_close_and_the_same_with_gradients(case: Case) -> None:
    generator = case.load("full", precision="bf16")
    expected, time = case.sampled.own_prediction(generator, case.noise)
    with torch.no_grad():
        sampled = generator.predict(case.noise, time, case.conditioning)
    learned = generator.predict(case.noise, time, case.conditioning)
    assert torch.equal(sampled, learned.detach())
    learned.square().mean().backward()
    error = float((sampled - expected).norm() / expected.norm())
    assert 1e-5 < error < 0.1


def test_frozen_weights_in_bf16_predict_the_same_bits(case: Case, tmp_path: Path) -> None:
    """Autocast rounds them at every call in any case; the adapter stays fp32, when it is made and when it is loaded."""
    held, whole = (case.load("lora", precision="bf16", weights=weights) for weights in ("bf16", "fp32"))
    made, drawn = ({n: v for n, v in g.network.named_parameters() if ".lora_" in n} for g in (held, whole))
    assert all(torch.equal(value, drawn[name].bfloat16().float()) for name, value in made.items())
    kinds = {value.dtype for name, value in held.network.named_parameters() if value.ndim == 2 and name not in made}
    assert torch.bfloat16 in kinds
    assert {value.dtype for value in made.values()} == {torch.float32}
    before = held.predict(case.noise, torch.full((2,), 0.7), case.conditioning)
    with torch.no_grad():
        for number, value in enumerate(made.values()):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) / 10)
    held.save_network(tmp_path)
    trained = {name: value.clone() for name, value in made.items()}
    found = []
    for generator in (held, whole):
        generator.load_network(tmp_path)
        with torch.no_grad():
            found.append(generator.predict(case.noise, torch.full((2,), 0.7), case.conditioning))
    assert torch.equal(*found)
    assert not torch.equal(found[0], before)
    loaded = {n.replace(".default_0.", ".default."): v for n, v in held.network.named_parameters() if ".lora_" in n}
    assert loaded.keys() == trained.keys()
    # The scale of 3 is in B there.
    assert all(torch.equal(v, trained[n] * (3 if ".lora_B." in n else 1)) for n, v in loaded.items())


@MODES
def test_without_data_a_call_makes_as_much_as_with_it(mode: str, case: Case) -> None:
    """What `vipo plan` counts: weights, and the most bytes alive in a call with gradients and in a decoding."""
    generator, lora = case.load(mode), LoraConfig(rank=2, alpha=6.0) if mode == "lora" else None
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    outlined = outline(case.config, ROOT, fake, lora)
    kinds = [
        [(name, value.shape, value.dtype, value.requires_grad) for name, value in each.network.named_parameters()]
        for each in (generator, outlined)
    ]
    assert kinds[0] == kinds[1]
    longest = longest_conditioning(outlined, ROOT, 2, fake)
    wanted = {n: v for n, v in case.conditioning.items() if not n.startswith("negative_") or n in longest}
    assert {name: (value.ndim, value.shape[-1] if value.ndim == 3 else 0) for name, value in longest.items()} == {
        name: (value.ndim, value.shape[-1] if value.ndim == 3 else 0) for name, value in wanted.items()
    }
    with fake:
        like = {name: torch.empty_like(value) for name, value in case.conditioning.items()}
        given = (torch.empty_like(case.noise), torch.empty(2), like)
    if case.row.family in ("z_image", "hunyuan_video"):
        with pytest.raises(DataDependentOutputException):
            _most_alive(fake, outlined, *given)
        return
    found = _most_alive(contextlib.nullcontext(), generator, case.noise, torch.full((2,), 0.7), case.conditioning)
    assert found == pytest.approx(_most_alive(fake, outlined, *given), rel=0.02)


def _most_alive(
    mode: contextlib.AbstractContextManager[Any], generator: Any, latents: Tensor, times: Tensor, given: Any
) -> list[int]:
    def learn() -> None:
        generator.predict(latents, times, given).square().mean().backward()

    known = [latents, times, *given.values()]
    return [peak_bytes(mode, generator, known, call) for call in (learn, lambda: generator.pictures(latents))]


@MODES
def test_trained_weights_load_into_the_stock_pipeline(mode: str, case: Case, tmp_path: Path) -> None:
    generator = case.load(mode)
    with torch.no_grad():
        for index, value in enumerate(value for value in generator.network.parameters() if value.requires_grad):
            value.add_(0.01 * (index % 5 + 1) if mode == "lora" else 0.01)
    generator.save_network(tmp_path)
    chain = case.sampled.chain(generator)
    ours = generator.pictures(sample_ode(generator, case.conditioning, chain, case.noise))
    assert float((ours - case.sampled.pictures).abs().max()) > 2e-4
    part = generator.network_folder
    if mode == "lora":
        pipeline = case.row.stock(case.folder)
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(tmp_path)
        else:
            getattr(pipeline, part).load_lora_adapter(tmp_path, prefix=part, use_safetensors=True)
    else:
        network = type(generator.network).from_pretrained(tmp_path, subfolder=part)
        pipeline = case.row.stock(case.folder, **{part: network})
    stock = case.row.sample(pipeline, case.config, case.noise).pictures
    # Larger weights than the random ones round more, and the scale of LoRA is part of B there.
    torch.testing.assert_close(stock, ours, atol=5e-5, rtol=0)
    again = case.load()
    for _ in range(2):
        again.load_network(tmp_path)
    _, time = case.sampled.own_prediction(generator, case.noise)
    with torch.no_grad():
        found, expected = (each.predict(case.noise, time, case.conditioning) for each in (again, generator))
    torch.testing.assert_close(found, expected, **EXACT)


def test_prompts_are_encoded_apart_and_the_negative_one_is_stored_once(case: Case, tmp_path: Path) -> None:
    prompts = [Prompt(prompt_id(text), text, {}) for text in PROMPTS]
    source = tmp_path / "eval.jsonl"
    source.write_text("".join(json.dumps(vars(prompt)) + "\n" for prompt in prompts))
    encode_prompt_file(case.config, ROOT, source, tmp_path / "eval.safetensors", {})
    widths = resolve_class(case.config).conditioning_widths(case.config, ROOT)
    loaded = load_embeddings(tmp_path / "eval.safetensors", prompts, widths=widths)
    found = stack_conditioning(loaded, [prompt.id for prompt in prompts])
    assert found.keys() == case.conditioning.keys()
    assert all(torch.equal(found[name], value) for name, value in case.conditioning.items())
    for name, value in found.items():
        assert torch.equal(value[0], value[1]) == name.startswith("negative_") or name.endswith("mask"), name


def test_what_is_sharded_over_processes_is_a_block_of_the_network(case: Case) -> None:
    network = case.load().network
    blocks = set(network._no_split_modules)
    held = [module for module in network.modules() if type(module).__name__ in blocks]
    assert len(held) > 1


def _encode(config: GeneratorConfig, root: Path) -> list[dict[str, Tensor]]:
    return resolve_class(config).encode_prompts(config, root, ["a fox"])


def test_a_tensor_that_a_part_lacks_or_does_not_take_is_named(case: Case, tmp_path: Path) -> None:
    for part in case.row.parts:
        folder = shutil.copytree(case.folder, tmp_path / part)
        faults: list[str] = []
        edit_tensors(folder / part, lambda tensors, faults=faults: faults.extend(faulty(tensors)))
        config = case.row.config(folder)
        read = _encode if part.startswith("text") else load_generator
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


def test_what_the_chain_and_the_network_leave_out_is_told(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.load()
    told = " ".join(record.getMessage() for record in caplog.records)
    terminal = case.sampled.scheduler.config.get("shift_terminal")
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
