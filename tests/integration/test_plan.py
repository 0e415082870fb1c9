"""`vipo plan`: counted by hand on the tiny generator, and refused where a device is too small."""

import json
import re
from pathlib import Path

import pytest

from vipo.cli import app
from vipo.config.compose import load_config, repository_root
from vipo.errors import VipoError
from vipo.generators import load_generator
from vipo.training.plan import plan

ROOT = repository_root()


def test_parts_are_those_of_the_run(tiny_overrides: list[str]) -> None:
    config = load_config([*tiny_overrides, "arm=vipo", "training.save_at=[]", "training.keep_checkpoints=1"])
    found = plan(config, ROOT, prompts=10)
    generator, training = load_generator(config.generator, ROOT), config.training
    weights = sum(value.numel() for value in generator.network.parameters())
    assert found.trained == weights
    assert found.held["network"] == 4 * weights
    assert found.held["AdamW"] == 8 * weights
    assert found.held["reference"] == 0
    samples, latent = training.prompts_per_update * training.group_size, 1
    for side in generator.latent_shape:
        latent *= side
    assert found.held["trajectories"] == samples * 2 * config.sampling.steps * latent * 4
    lessons = samples * training.trained_transitions
    assert found.evaluations == {"rollouts": samples * config.sampling.steps, "learning": lessons, "comparing": 0}
    # Weights and two moments of a checkpoint, twice while the next one is written; the final weights.
    assert found.disk == 4 * weights * (3 * 2 + 1)
    assert found.phases["learns"] > found.phases["rolls out"] > 0


def test_what_saves_memory_is_counted(tiny_overrides: list[str]) -> None:
    def of(*more: str) -> dict[str, int]:
        found = plan(load_config([*tiny_overrides, "arm=vipo", *more]), ROOT, prompts=10)
        return {**found.held, **found.phases, "evaluations": sum(found.evaluations.values()), "flops": found.flops}

    whole, lora = of("objective.kl_weight=0.1"), of("objective.kl_weight=0.1", "training.lora={rank: 2, alpha: 2}")
    assert whole["reference"] == whole["network"]
    assert lora["reference"] == 0
    assert lora["AdamW"] < whole["AdamW"] / 2
    plain, recomputed = of(), of("training.gradient_checkpointing=true")
    assert recomputed["learns"] < plain["learns"]
    assert recomputed["flops"] > plain["flops"]
    # The reference is compared with at every transition that is trained.
    assert whole["evaluations"] > plain["evaluations"]
    sharded = of("distribution={strategy: fsdp, processes: 2}")
    assert sharded["AdamW"] == plain["AdamW"] // 2


def test_the_command_says_what_would_fit(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", *tiny_overrides, "arm=vipo", "--results", str(tmp_path)]
    app([*command, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    app([*command, "--memory", "1", "--tflops", "2"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert re.search(r"^peak \(while it learns\) +\d+\.\d\d GiB$", shown, re.MULTILINE)
    assert re.search(r"^an update at 2 TFLOP/s +\d", shown, re.MULTILINE)
    with pytest.raises(VipoError, match=r"it would fit with training\.gradient_checkpointing=true"):
        app([*command, "--memory", str((found["peak"] - 1) / 2**30)], standalone_mode=False)
    with pytest.raises(VipoError, match="or shard it: distribution"):
        app([*command, "--memory", "0"], standalone_mode=False)
    with pytest.raises(VipoError, match="nothing to plan"):
        app([*command, "arm=base"], standalone_mode=False)
