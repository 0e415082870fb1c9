"""The benchmarks print what they promise, in their smallest size."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from vipo.config.compose import repository_root


def test_one_command_compares_the_maps_and_gives_their_share_of_a_training_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = repository_root() / "benchmarks/perception.py"
    monkeypatch.setattr("sys.argv", [str(script), "--pixels", "56", "--repeats", "1", "--updates", "1"])
    runpy.run_path(str(script), run_name="__main__")
    compared, share = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert compared["pixels"] == 56
    assert compared["reference_over_ours"]["median"] > 0
    assert share["experiment"] == "demo"
    assert 0 < share["module_share"]["median"] < 1


def test_an_update_s_time_is_told_by_part(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import update_share

    monkeypatch.setattr("sys.argv", ["update_share", *tiny_overrides, "arm=vipo", "--updates", "1"])
    update_share.main()
    figures = json.loads(capsys.readouterr().out)
    assert (figures["run"], figures["updates"]) == ("vipo-s0", 1)
    assert figures["parts"].keys() == {"time/rollout", "time/decode", "time/reward", "time/map", "time/learn"}
    assert figures["update_over_floor"] > 1


def test_the_pitfalls_are_measured(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import pitfalls

    shown: list[str] = []
    monkeypatch.setattr("builtins.print", shown.append)
    monkeypatch.setattr("sys.argv", ["pitfalls", *tiny_overrides, "arm=uniform"])
    pitfalls.main()
    figures = json.loads(shown[-1])
    assert figures["nothing wrong: max |log rho|"] == 0
    assert figures["latents stored in bf16: max |log rho|, position"] > 1e-3
    channels = 4
    ratio = figures["channels sum: rms log rho, position"] / figures["channels mean: rms log rho, position"]
    assert ratio == pytest.approx(channels, rel=1e-3)


def test_compiled_blocks_are_compared_with_and_without_gradients(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the compiler gives back what it was given, so that nothing is rounded otherwise."""
    from benchmarks import pitfalls

    sound, asked, shown = nn.Module.compile, list[Any](), list[str]()

    def traced(module: nn.Module, **options: Any) -> None:
        asked.append(options.pop("options"))
        sound(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", traced)
    monkeypatch.setattr("builtins.print", shown.append)
    monkeypatch.setattr("sys.argv", ["pitfalls", *tiny_overrides, "arm=uniform", "--compiled"])
    pitfalls.main()
    assert list(json.loads(shown[-1]).values()) == [0, 0]
    assert [bool(each) for each in asked] == len(asked) // 2 * [False] + len(asked) // 2 * [True]


def test_an_update_asks_for_no_more_than_reviewed(tiny_generator: Path) -> None:
    """Counts alone: calls, backward passes, values and bytes that the host reads; no clock."""
    from benchmarks.compare import BASELINE, SMALL, count_update, judged

    baseline = json.loads(BASELINE.read_text())
    found = count_update([*SMALL, f"generator.path={tiny_generator}"])
    assert judged(found, baseline) == []
    # Two micro-batches of four samples: four steps each, and two transitions learned.
    assert found["update.network"] == 2 * (4 + 2)
    assert found["update.backward"] == 2 * 2
    assert found["update.decoder"] == found["update.backbone"] == found["update.reward"] == 2
    dearer = judged(found | {"update.network": 13.0, "start.help": 9.0, "new": 0.0}, baseline)
    assert {name for name, *_ in dearer} == {"update.network", "start.help", "new"}


def test_the_curves_are_drawn_from_their_figures() -> None:
    from benchmarks.growth import CURVES, draw

    root = repository_root()
    curves = json.loads((root / "benchmarks/growth.json").read_text())["curves"]
    assert set(curves) <= {*CURVES, "frames", "processes"}
    assert draw(curves) == (root / "docs/images/growth.svg").read_text()
