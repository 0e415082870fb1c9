"""The script for a GPU still runs: every step in miniature on the CPU."""

import itertools
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu import correct, families, processes
from benchmarks.gpu.correct import measure_agreement, measure_bytes, prepare
from benchmarks.gpu.evaluation import measure_evaluation
from benchmarks.gpu.families import measure_families
from benchmarks.gpu.miniatures import TINY
from benchmarks.gpu.options import OPTIONS, measure_options
from benchmarks.gpu.planned import count_plans, over_plan, planned_bytes
from benchmarks.gpu.real_size import measure_family
from benchmarks.gpu.record import Record, read_figures
from benchmarks.gpu.rehearsal.unloaded import unloaded_overrides
from benchmarks.gpu.size import family_overrides
from benchmarks.gpu.sizes import REAL
from benchmarks.gpu.waits import host_waits, measure_waits
from vipo.config.compose import load_config, repository_root
from vipo.conformance.checks import EXACT, finding
from vipo.conformance.table import CHECKS
from vipo.generators.configured import resolve_class
from vipo.tracking.timer import Timer
from vipo.training.plan import plan
from vipo.training.setup import set_up


# `sd3_lora` is `sd3_window` but for the steps that are trained.
@pytest.mark.parametrize("family", sorted(set(TINY) - {"sd3_lora"}))
def test_a_family_is_measured_by_part(family: str, tmp_path: Path) -> None:
    measure_family(Record(tmp_path / "figures"), TINY[family], "cpu", 1.0, {})
    figures = read_figures(tmp_path / "figures")
    assert figures["max_log_ratio_before_first_step"] < 1e-5
    assert figures["parameters"]["trained_parameters"] > 0
    floor = ("floor_seconds.network", "update_over_network_floor")
    for key in ("update_seconds", "update_seconds.learn", *floor, "plain_loop_seconds"):
        assert figures[key] > 0
    assert 0 < figures["map_bf16.share"] < 1
    assert 0 < figures["map_bf16.largest_difference"] < 1
    assert set(REAL) == set(TINY)


@pytest.mark.parametrize(
    ("step", "tried"),
    [
        (
            "sd3_options",
            ("without_recomputation", "compiled", "shared_start", "joined", "larger_rollout", "second_order"),
        ),
        ("flux_options", ("native_flash", "native_efficient")),
        ("adamw_options", ("fused", "lists")),
    ],
)
def test_options_are_measured_on_and_off(
    step: str, tried: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, (size, cases) = nn.Module.compile, OPTIONS[step]
    # Kernels for a CPU take minutes to compile.
    traced = {"backend": "eager", "fullgraph": True, "dynamic": False}
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: sound(module, **traced))
    measure_options(Record(tmp_path / "figures"), TINY[size], "cpu", {name: cases[name] for name in tried})
    figures = read_figures(tmp_path / "figures")
    for name in tried:
        if name == "native_efficient":
            assert "CUDA devices alone" in figures[f"{name}.refused"]
            continue
        assert figures[f"{name}.max_log_ratio_before_first_step"] < 1e-5
        assert figures[f"{name}.update_seconds"] > 0


def test_an_option_that_fails_leaves_the_others_their_time(tmp_path: Path) -> None:
    size, _ = OPTIONS["adamw_options"]
    with pytest.raises(RuntimeError, match="failed: nowhere"):
        measure_options(Record(tmp_path / "failed"), TINY[size], "cpu", {"nowhere": ("generator.device=cuda:99",)})
    assert "CUDA devices" in read_figures(tmp_path / "failed")["nowhere.failed"]


def test_the_cpu_agrees_with_itself_and_its_waits_are_counted(tmp_path: Path) -> None:
    record = Record(tmp_path / "figures")
    measure_agreement(record, "cpu", ["sd"])
    measure_waits(record, "cpu")
    figures = read_figures(tmp_path / "figures")
    assert figures["sd.fp32.max_log_ratio"] == figures["sd.update.largest_weight_difference"] == 0
    assert set(figures["sd.relative_differences"].values()) == {0}
    # A constant number a micro-batch, none that grows faster: four, and a read of each of its prompt's two embeddings
    # from a file, for which no device is waited for.
    assert 0 <= figures["host_waits.a_micro_batch"] <= 4 + 2


def test_what_pytorch_warns_of_and_the_timer_s_synchronisations_are_the_waits_for_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait(*_: object) -> None:
        # As a device would that does both; it is one wait all the same.
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    timer, on_the_host = Timer("cuda"), torch.ones(3)
    with warnings.catch_warnings(record=True) as others:
        with host_waits() as lines:
            assert modes == ["default", "warn"]
            with timer("part"):
                # Of tensors in main memory nobody waits for a device.
                assert on_the_host.sum().item() == 3
                assert len(torch.nonzero(on_the_host)) == 3
            for _ in range(3):
                wait()
            warnings.warn("something else", stacklevel=1)
        with timer("afterwards"):
            pass
    assert modes == ["default", "warn", "default"]
    timed = [line for line in lines if line.startswith("tracking/timer.py:") and line.endswith(" _now")]
    assert sum(lines[line] for line in timed) == 2
    assert {line: count for line, count in lines.items() if line not in timed} == {"outside vipo": 3}
    assert "something else" in [str(warning.message) for warning in others]


def test_the_device_is_compared_without_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends, allowed = (torch.backends.cudnn, torch.backends.cuda.matmul), list[bool]()

    def noted(*_: Any, **__: Any) -> None:
        allowed.extend(backend.allow_tf32 for backend in backends)

    monkeypatch.setattr(correct, "prepared_setup", noted)
    monkeypatch.setattr(families, "subject", noted)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    try:
        for measured in (partial(measure_agreement, families=["demo"]), partial(measure_families, names=["sd"])):
            with pytest.raises(RuntimeError, match=r"^failed: (demo|sd)$"):
                measured(Record(tmp_path / "figures"), "cpu")
        assert len(allowed) >= 4
        assert not any(allowed)
        assert all(backend.allow_tf32 for backend in backends)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def test_a_family_that_fails_or_is_apart_from_the_cpu_fails_the_step_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, seen = correct._computed, itertools.count()

    def disturbed(*given: Any) -> dict[str, torch.Tensor]:
        found = computed(*given)
        # Of the device's, the log-probabilities alone.
        return found | {"log_prob": found["log_prob"] * (1.1 if next(seen) else 1.0)}

    learn = correct.update

    def learned(*given: Any) -> dict[str, float]:
        # A ratio that `vipo train` would refuse stops nothing here, and is told.
        return learn(*given) | {"log_ratio/max_before_first_step": 2e-5}

    assert "training.log_ratio_tolerance=1e9" in correct.SMALL
    monkeypatch.setattr(correct, "_computed", disturbed)
    monkeypatch.setattr(correct, "update", learned)
    with pytest.raises(RuntimeError, match=r"^failed: nowhere, demo \(log_prob\), demo \(log_ratio\)$"):
        measure_agreement(Record(tmp_path / "figures"), "cpu", ["nowhere", "demo"])
    figures = read_figures(tmp_path / "figures")
    apart = figures["demo.relative_differences"]
    assert {key for key, value in apart.items() if value} == {"log_prob"}
    assert 0.1 <= apart["log_prob"] < 1
    assert figures["demo.fp32.max_log_ratio"] == 2e-5


def test_a_killed_run_leaves_the_same_bytes(tmp_path: Path) -> None:
    # That a run has the same bytes twice, other tests show.
    measure_bytes(Record(tmp_path / "figures"), "cpu", ("first", "killed"))
    figures = read_figures(tmp_path / "figures")
    assert figures["killed_while_running"]
    assert figures["resumed"]
    assert figures["files"] > 2
    assert figures["differing_files.killed_and_resumed"] == []


def test_a_plan_is_counted_and_compared_and_other_sizes_are_drawn(tmp_path: Path) -> None:
    record, figures = Record(tmp_path / "figures"), tmp_path / "figures"
    with pytest.raises(RuntimeError, match="failed: nowhere"):
        count_plans(record, {"nowhere": replace(TINY["flux"], family="benchmarks:nothing"), "own": TINY["sd3_lora"]})
    found = planned_bytes(read_figures(figures), "own")
    config = load_config(family_overrides(TINY["sd3_lora"], tmp_path / "sd3_lora", "cuda"))
    expected = plan(config, repository_root(), 1)
    assert found["evaluation"] == expected.evaluation > 0
    assert max(found[part] for part in ("rollout", "decode", "learn")) == expected.peak
    assert planned_bytes(read_figures(figures), "nowhere") == {}
    assert over_plan({"learn": 350, "map": 10}, {"learn": 200, "decode": 20}, beside=50) == {"learn": 1.5}
    # As the stage is.
    torch.use_deterministic_algorithms(False)
    measure_evaluation(record, TINY["sd3_lora"], "cpu", found)
    assert torch.are_deterministic_algorithms_enabled()
    sides = [read_figures(figures)[f"{case}.samples"][-2:] for case in ("at_training_size", "at_its_own_size")]
    assert sides == [[32, 32], [48, 48]]


def test_families_in_miniature_are_compared_and_one_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path / "figures")
    with pytest.raises(RuntimeError, match=r"failed: nowhere$"):
        measure_families(record, "cpu", ["nowhere", "sd"])
    figures = read_figures(tmp_path / "figures")
    assert figures["sd.first prediction"] <= EXACT
    assert figures["sd.prediction.difference_to_cpu"] <= EXACT
    assert figures["sd.max |log rho|, lora"] == figures["sd.max |log rho|, full"] == 0
    assert not any("fails" in key for key in figures)
    wrong = {**CHECKS, "prediction": lambda compared: [finding("first prediction", 1.0, EXACT)]}
    monkeypatch.setattr(families, "CHECKS", wrong)
    monkeypatch.setattr(families, "_CHECKS", ("prediction",))
    with pytest.raises(RuntimeError, match=r"failed: sd \(first prediction\)$"):
        measure_families(record, "cpu", ["sd"])
    assert "limit 1e-05" in read_figures(tmp_path / "figures")["sd.first prediction.fails"]


def test_groups_of_one_and_of_two_learn_what_one_process_learns(tmp_path: Path) -> None:
    record, chosen = Record(tmp_path / "figures"), processes.overrides(2, "cpu")
    experiment = prepare(tmp_path / "results", chosen)
    setup = set_up(processes.small(chosen), repository_root(), experiment)
    before = {name: value.detach().clone() for name, value in setup.trainable.items()}
    expected, ratio = processes.trained(setup)
    assert ratio == 0
    moved = max(float((expected[name] - value).abs().max()) for name, value in before.items())
    # The third one, in main memory, is another test's.
    assert list(processes.GROUPS_OF_ONE) == ["ddp", "fsdp", "fsdp_offload"]
    for strategy in ("ddp", "fsdp"):
        processes.measure_alone(record, strategy, chosen, experiment, expected)
    processes.measure_several(record, "ddp", 2, chosen, tmp_path / "results", expected)
    figures = read_figures(tmp_path / "figures")
    apart = {key: value for key, value in figures.items() if key.endswith("largest_weight_difference")}
    assert len(apart) == 3
    # AdamW's first steps make much of a gradient that is nearly nothing, whatever its sign.
    assert {key: value for key, value in apart.items() if not value < 0.1 * moved} == {}
    assert figures["ddp.max_log_ratio_before_first_step"] == figures["fsdp.max_log_ratio_before_first_step"] == 0


@pytest.mark.parametrize("name", ["sdxl", "qwen_image_21", "wan22_a14b"])
def test_a_generators_memory_at_real_size_can_be_rehearsed(name: str, tmp_path: Path) -> None:
    """Its run composes, and its prompts are what its network takes; the run itself takes a minute."""
    config = load_config(unloaded_overrides(name, tmp_path, "cpu"))
    adapter, root = resolve_class(config.generator), repository_root()
    adapter.check(config.generator, root)
    [row] = adapter.encode_prompts(config.generator, root, ["a fox"])
    widths = adapter.conditioning_widths(config.generator, root)
    assert {key: row[key].shape[-1] for key in widths} == widths
    assert all(row[mask].min() == 1 for mask in adapter.masks)
