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
