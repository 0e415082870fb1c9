"""Compiled blocks, attention backends and AdamW's fused kernel in training: the same run, or an error that says why."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from safetensors.torch import load_file
from torch import nn
from toy_generator import ToyNetwork

from vipo.check.machine import machine_lines
from vipo.config.compose import load_config, repository_root
from vipo.config.validation import ConfigError
from vipo.errors import VipoError
from vipo.evaluation.held_out import HeldOut
from vipo.evaluation.sample import draw, evaluation_chain
from vipo.generators import GeneratorError, kernels, load_generator
from vipo.generators.applied import KernelError, not_applied
from vipo.generators.compiler import check_compiler
from vipo.generators.embeddings import load_embeddings
from vipo.generators.kernels import repeated_blocks, use_kernels
from vipo.prompts import read_prompts
from vipo.stages import train_stage, training
from vipo.training.plan import plan
from vipo.training.recorded import train_run
from vipo.training.setup import Setup, set_up
from vipo.training.update import update

ROOT = repository_root()
OFFLOADED = "distribution={strategy: fsdp, offload: true}"
LORA = "training.lora={rank: 2, alpha: 2}"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Blocks are traced, and differentiated, as for compilation, and computed by PyTorch's own operations; what was
    asked of the compiler for each."""
    asked: list[Any] = []
    sound = nn.Module.compile

    def compile_traced(module: nn.Module, **options: Any) -> None:
        asked.append(options)
        sound(module, fullgraph=options["fullgraph"], dynamic=options["dynamic"], backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_traced)
    torch._dynamo.reset()
    yield asked
    torch._dynamo.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


def _compiled(network: nn.Module) -> list[bool]:
    return [block._compiled_call_impl is not None for block in repeated_blocks(network)]


def _setup(prepared: Path, overrides: list[str], *more: str) -> Setup:
    return set_up(load_config([*overrides, "arm=vipo", *more]), ROOT, prepared / "demo")


def _run(results: Path, overrides: list[str]) -> Path:
    train_run(load_config(overrides), ROOT, results / "demo")
    return results / "demo/runs/vipo-s0"


@pytest.mark.parametrize(
    "more",
    [
        [LORA, "training.gradient_checkpointing=true", "generator.precision=bf16", "generator.weights=bf16"],
        ["objective.kl_weight=0.1"],
        [LORA, OFFLOADED, "training.gradient_checkpointing=true"],
    ],
    ids=["lora", "full", "sharded"],
)
def test_a_run_of_compiled_blocks_is_the_same_run(
    more: list[str], traced: list[Any], prepared: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Where a compiled block computes what it did before, so does the run: adapter, recomputation, reference, shards
    and saved weights do not know of it; and every ratio is 1."""
    small = ["training.updates=2", "training.prompts_per_update=1", "training.optimizer_steps_per_update=1"]
    chosen = [*tiny_overrides, "arm=vipo", *small, "training.save_at=[]", *more]
    plain, compiled = (Path(shutil.copytree(prepared, tmp_path / name)) for name in ("plain", "compiled"))
    expected = _run(plain, chosen)
    assert not traced
    found = _run(compiled, [*chosen, "generator.compile=blocks"])
    assert traced
    assert all(each["options"]["emulate_precision_casts"] and each["options"]["deterministic"] for each in traced)
    rows = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert [row["log_ratio/max_before_first_step"] for row in rows] == [0, 0]
    files = sorted(path.relative_to(expected) for path in (expected / "weights").rglob("*.safetensors"))
    assert files
    if "objective.kl_weight=0.1" in more:
        # Of all weights, gradients that meet are added up in another order.
        for file in files:
            its, own = (load_file(run / file) for run in (found, expected))
            assert max(float((its[name] - value).abs().max()) for name, value in own.items()) < 1e-6
        return
    for file in (Path("metrics.jsonl"), *files):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file


def test_what_is_compiled_stays_so(
    traced: list[Any], prepared: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """The policy, the copy of it that is the reference, and weights of a whole network that are loaded later."""
    setup = _setup(prepared, tiny_overrides, "generator.compile=blocks", "objective.kl_weight=0.1")
    assert setup.reference is not None
    for network in (setup.generator.network, setup.reference):
        assert set(_compiled(network)) == {True}
    setup.generator.save_network(tmp_path)
    before = setup.generator.network
    setup.generator.load_network(tmp_path)
    assert setup.generator.network is not before
    assert set(_compiled(setup.generator.network)) == {True}


def _graph_break(*_: Any, **__: Any) -> None:
    torch._dynamo.graph_break()


@pytest.mark.parametrize(
    ("option", "broken", "told"),
    [
        (
            "generator.attention=_native_math",
            ValueError("no mask here"),
            r"network on cpu failed \(ValueError: no mask here\)",
        ),
        ("generator.compile=blocks", _graph_break, r"network on cpu failed \(Unsupported: "),
    ],
    ids=["attention", "compile"],
)
def test_kernels_that_fail_are_told_before_anything_is_computed(
    option: str,
    broken: Any,
    told: str,
    traced: list[Any],
    prepared: Path,
    tiny_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        if isinstance(broken, Exception):
            raise broken
        broken(*given, **named)

    registry = attention_dispatch._AttentionBackendRegistry
    for backend in list(registry._backends):
        monkeypatch.setitem(registry._backends, backend, fail)
    with pytest.raises(KernelError, match=told):
        _setup(prepared, tiny_overrides, option)
    config = load_config([*tiny_overrides, "arm=base", option])
    generator = load_generator(config.generator, ROOT)
    samples = [HeldOut(prompt, 0) for prompt in read_prompts(prepared / "demo/prompts/eval.jsonl")[:2]]
    embeddings = load_embeddings(prepared / "demo/embeddings/eval.safetensors", [each.prompt for each in samples])
    with torch.no_grad(), pytest.raises(KernelError, match=told):
        draw(generator, evaluation_chain(generator, config), samples, embeddings, config)


@pytest.mark.parametrize(
    ("programs", "variables", "headers", "told"),
    [
        (["gcc"], {}, True, None),
        (["clang"], {}, True, None),
        (["mine"], {"CC": "mine"}, True, None),
        ([], {}, True, "install gcc libc6-dev (Debian"),
        (["gcc"], {"CC": "mine"}, True, "install gcc libc6-dev (Debian"),
        (["gcc"], {}, False, "Python.h not here, with which Triton builds: install python3."),
        ([], {}, False, "install gcc libc6-dev python3."),
    ],
)
def test_a_gpu_s_blocks_want_a_c_compiler_before_anything_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    programs: list[str],
    variables: dict[str, str],
    headers: bool,
    told: str | None,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr("vipo.generators.configured.check_device", lambda _: None)

    def encoding(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(training, "make_missing", encoding)
    demo = ["experiment=demo", "arm=vipo"]
    config = load_config([*demo, "generator.device=cuda", "generator.compile=blocks"])
    lines = {line.subject: (line.verdict, line.said) for line in machine_lines(config, [])}
    if told is None:
        assert lines["compiler"][0] == "ok"
        with pytest.raises(InterruptedError):
            train_stage(config, ROOT, tmp_path)
        return
    assert lines["compiler"][0] == "to do"
    assert told in lines["compiler"][1]
    with pytest.raises(GeneratorError, match=re.escape(told)):
        train_stage(config, ROOT, tmp_path)
    # Nobody else needs one.
    for other in (["generator.compile=blocks"], ["generator.device=cuda"]):
        check_compiler(load_config([*demo, *other]).generator)


def test_a_compiler_that_is_switched_off_is_told(traced: list[Any], prepared: Path, tiny_overrides: list[str]) -> None:
    """As TORCHDYNAMO_DISABLE=1 does."""
    told = r"a call of the network .* with fullgraph=True found no compiled frames"
    with torch._dynamo.config.patch(disable=True), pytest.raises(KernelError, match=told):
        _setup(prepared, tiny_overrides, "generator.compile=blocks")


def test_an_attention_backend_is_what_the_run_computes_with(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's explicit attention: each call of the network makes one call of it a layer, and the update is the same
    within rounding."""
    registry, math = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName._NATIVE_MATH
    sound: Callable[..., Any] = registry._backends[math]
    calls: list[int] = []

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return sound(*given, **named)

    monkeypatch.setitem(registry._backends, math, counted)
    found = _setup(prepared, tiny_overrides, "generator.attention=_native_math")
    layers = sum(hasattr(module, "processor") for module in found.generator.network.modules())
    # The trial.
    assert len(calls) == layers > 0
    metrics = [update(each, 1) for each in (found, _setup(prepared, tiny_overrides))]
    # Two micro-batches of four steps, and of two trained ones.
    assert len(calls) == layers * (1 + 2 * (4 + 2))
    assert metrics[0]["log_ratio/max_before_first_step"] == 0
    assert metrics[0]["grad/norm"] == pytest.approx(metrics[1]["grad/norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["generator.attention=flash"], "adds up in no fixed order.*'_native_flash' is PyTorch's own"),
        (["generator.attention=_flash_3"], "diffusers calls it without a backward pass; one of default, native"),
        (["generator.attention=sage"], "it has no backward pass"),
        (["generator.attention=_sage_qk_int8_pv_fp16_cuda"], "it has no backward pass"),
        (["generator.attention=_native_cudnn"], "for which PyTorch refuses it in training"),
        (["generator.attention=flash_hub"], "its code is fetched from the hub"),
        (["generator.attention=nonsense"], "'nonsense': diffusers has no such backend"),
        (["generator.attention=_native_efficient"], "has kernels for CUDA devices alone"),
        (["generator.attention=_native_flash", "generator.device=cuda"], "for bf16 alone on CUDA devices"),
        (["generator.compile=blocks", "arm=attention"], "it listens to calls inside the network"),
        (["training.rollout_batch=16", "arm=attention"], "attention': it watches the rollout of each micro-batch"),
        (
            ["sampling.window={size: 1, shared_start: true}", "training.trained_transitions=1", "arm=attention"],
            "shared_start true and credit source 'attention'",
        ),
        (
            [
                *("sampling.window={size: 1, shared_start: true}", "sampling.same_initial_noise=false"),
                "training.trained_transitions=1",
            ],
            "shared_start needs same_initial_noise true",
        ),
        (["optimizer=adamw_8bit", "+optimizer.fused=true"], "fused"),
    ],
)
def test_what_cannot_be_is_refused_in_the_configuration(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(["experiment=demo", *overrides])


def test_what_the_page_says_to_type_composes() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8").split("## Options for speed")[1].split("```")[1]
    commands = [shlex.split(line) for line in page.strip().splitlines()]
    assert [command[:2] for command in commands] == [["vipo", "train"]] * 3
    configs = [load_config(command[2:]) for command in commands]
    assert configs[0].generator.compile == "blocks"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("generator", "compile", "blocks"),
        ("generator", "attention", "_native_math"),
        ("optimizer", "fused", False),
        ("perception", "precision", "bf16"),
        ("training", "joined_transitions", 2),
    ],
)
def test_a_choice_is_part_of_the_identity_where_it_was_made(section: str, key: str, value: object) -> None:
    """And nowhere else: what was trained before there was a choice keeps its identity."""
    chosen = ["experiment=demo", "arm=vipo"]
    plain = load_config(chosen).training_identity()
    assert key not in plain[section]
    made = load_config([*chosen, f"{section}.{key}={str(value).lower()}"])
    assert made.training_identity() == {**plain, section: {**plain[section], key: value}}


def test_a_network_without_blocks_is_refused(tiny_overrides: list[str]) -> None:
    network = ToyNetwork()
    for option in ("compile=blocks", "attention=native"):
        config = load_config([*tiny_overrides, f"generator.{option}"]).generator
        told = not_applied(network, config)
        assert told is not None
        assert "would change nothing: the network of family 'flux' (ToyNetwork)" in told
        with pytest.raises(VipoError, match="would change nothing"):
            use_kernels(network, config)


def test_a_backend_that_the_environment_chooses_is_refused(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers reads the variable when it is imported."""
    monkeypatch.setattr(kernels, "DIFFUSERS_ATTN_BACKEND", "flash")
    with pytest.raises(VipoError, match=r"DIFFUSERS_ATTN_BACKEND=flash: .*unset it, and set generator\.attention"):
        load_generator(load_config(tiny_overrides).generator, ROOT)


def test_a_plan_is_of_pytorchs_own_kernels(tiny_overrides: list[str]) -> None:
    plans = [
        plan(load_config([*tiny_overrides, "arm=grpo", *more]), ROOT, 2)
        for more in ([], ["generator.compile=blocks", "generator.attention=_native_math"])
    ]
    assert plans[0].peak == plans[1].peak


def test_adamw_fused_or_by_lists_is_one_step_within_rounding(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    chosen = [*tiny_overrides, "arm=vipo", "training.updates=1", "training.save_at=[]"]
    runs = [
        _run(Path(shutil.copytree(prepared, tmp_path / str(number))), [*chosen, *more])
        for number, more in enumerate(([], ["optimizer.fused=false", OFFLOADED]))
    ]
    if dist.is_initialized():
        dist.destroy_process_group()
    weights = [load_file(next((run / "weights").rglob("*.safetensors"))) for run in runs]
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-7, rtol=1e-5)
