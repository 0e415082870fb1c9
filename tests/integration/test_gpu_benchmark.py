"""The script for a GPU still runs: every step in miniature on the CPU, and whatever ends a step leaves its figures."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from benchmarks.gpu import gpu
from benchmarks.gpu.correct import measure_agreement, measure_bytes, measure_waits
from benchmarks.gpu.options import OPTIONS, measure_options
from benchmarks.gpu.real_size import measure_family
from benchmarks.gpu.record import Record, read_figures
from benchmarks.gpu.sizes import REAL, TINY


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_family_is_measured_by_part(family: str, tmp_path: Path) -> None:
    measure_family(Record(tmp_path / "figures"), TINY[family], "cpu", 1.0)
    figures = read_figures(tmp_path / "figures")
    assert figures["max_log_ratio_before_first_step"] < 1e-5
    assert figures["parameters"]["trained_parameters"] > 0
    floor = ("floor_seconds.network", "update_over_network_floor")
    for key in ("update_seconds", "update_seconds.learn", *floor, "plain_loop_seconds"):
        assert figures[key] > 0
    assert set(REAL) == set(TINY)


@pytest.mark.parametrize(
    ("step", "tried"),
    [
        ("sd3_options", ("off", "compiled")),
        ("flux_options", ("native_flash", "native_efficient", "bf16_map")),
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
    assert figures["sd.log_prob.difference"] == figures["sd.update.largest_weight_difference"] == 0
    more = figures["host_waits.4_micro_batches"] - figures["host_waits.2_micro_batches"]
    # A constant number a micro-batch, none that grows faster: four, and a read of each of its prompt's two embeddings
    # from a file, for which no device is waited for.
    assert 0 <= more <= 2 * (4 + 2)


def test_a_killed_run_leaves_the_same_bytes(tmp_path: Path) -> None:
    # That a run has the same bytes twice, other tests show.
    measure_bytes(Record(tmp_path / "figures"), "cpu", ("first", "killed"))
    figures = read_figures(tmp_path / "figures")
    assert figures["killed_while_running"]
    assert figures["resumed"]
    assert figures["files"] > 2
    assert figures["differing_files.killed_and_resumed"] == []


def test_what_a_step_noted_stays_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = tmp_path / "machine.jsonl"
    Record(noted).put("first", 1.5)
    with noted.open("a") as stream:
        stream.write('{"key": "half of a li')
    assert read_figures(noted) == {"first": 1.5}
    monkeypatch.setattr(gpu, "STEPS", (gpu.Step("machine", 0.2, "ended by its limit"), gpu.Step("flux", 60, "no time")))
    # A step that does not end by itself, and a clock that goes on by a quarter of a second whenever it is looked at.
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 3600\n")
    endless.chmod(0o755)
    monkeypatch.setattr(gpu, "sys", SimpleNamespace(executable=str(endless)))
    clock = itertools.count()
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock) / 4))
    results = gpu.run(tmp_path, "cpu", True, 5.5, ["machine", "flux"])
    assert results["steps"]["machine"]["status"].startswith("ended by its limit")
    assert results["steps"]["machine"]["figures"] == {"first": 1.5}
    assert "used up" in results["not_run"]["flux"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    assert "| machine | first | 1.5 |" in (tmp_path / "gpu.md").read_text()
