"""The benchmarks print what they promise, in their smallest size."""

import json
import runpy

import pytest

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
