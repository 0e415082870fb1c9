"""`vipo plan`: counted by hand on the tiny generator, and refused where a device is too small."""

import json
import math
import re
from pathlib import Path

import pytest

from vipo.cli import app
from vipo.config.compose import load_config, repository_root
from vipo.errors import VipoError
from vipo.generators import load_generator
from vipo.training.fit import require_fit
from vipo.training.plan import Plan, plan

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
    # Held are those of the update's samples, on the disk those of all prompts.
    assert found.embeddings == 10 * found.held["embeddings"] // samples
    more = ["optimizer=sgd", "optimizer.momentum=0.5", "training.ema_decay=0.5", "training.decode_batch=1"]
    other = plan(load_config([*tiny_overrides, "arm=vipo", *more]), ROOT, prompts=10)
    assert other.held["SGD with momentum 0.5"] == other.held["kept policies"] == 4 * weights
    assert other.phases["decodes"] < found.phases["decodes"]
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
    training, steps = load_config(tiny_overrides).training, load_config(tiny_overrides).sampling.steps
    samples = training.prompts_per_update * training.group_size
    assert of("credit.steps=ode")["evaluations"] - plain["evaluations"] == samples * steps * (steps - 1) // 2
    sharded = of("distribution={strategy: fsdp, processes: 2}")
    assert sharded["AdamW"] == plain["AdamW"] // 2


def test_policies_that_an_objective_keeps_are_counted(tiny_overrides: list[str]) -> None:
    def of(*more: str) -> Plan:
        return plan(load_config([*tiny_overrides, "arm=vipo", "objective={name: awm, kl_weight: 0}", *more]), ROOT, 2)

    with_anchor, without = of(), of("objective.anchor_weight=0")
    weights, lessons = with_anchor.held["network"], with_anchor.evaluations["learning"]
    assert (with_anchor.held["kept policies"], without.held["kept policies"]) == (weights, 0)
    # The policy that sampled, and the anchor.
    assert (with_anchor.evaluations["comparing"], without.evaluations["comparing"]) == (2 * lessons, lessons)
    checkpoints = load_config([*tiny_overrides, "arm=vipo"]).training.keep_checkpoints + 1
    assert with_anchor.disk - without.disk == weights * checkpoints


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
    assert found["uncounted"] == ["reward object_redness", "backbone efficientnet_lite0"]
    assert re.search(r"^memory of backbone efficientnet_lite0 +not counted\n\Z", shown, re.MULTILINE)
    with pytest.raises(VipoError, match=r"it would fit with training\.gradient_checkpointing=true"):
        app([*command, "--memory", str((found["peak"] - 1) / 2**30)], standalone_mode=False)
    with pytest.raises(VipoError, match="or shard it: distribution"):
        app([*command, "--memory", "0"], standalone_mode=False)
    with pytest.raises(VipoError, match="nothing to plan"):
        app([*command, "arm=base"], standalone_mode=False)


def test_what_would_fit_can_be_set(tiny_overrides: list[str]) -> None:
    """Shards hold one precision, an adapter keeps its rank, and what is set already is not named."""
    saved = "training.gradient_checkpointing=true"
    for more, told in (
        (
            ["distribution={strategy: fsdp, processes: 2}"],
            "training.micro_batch=1 training.lora={} generator.precision",
        ),
        (["training.lora={rank: 2, alpha: 2}", "training.micro_batch=1"], "with generator.precision=bf16 generator.w"),
    ):
        config = load_config([*tiny_overrides, "arm=vipo", saved, *more])
        found = plan(config, ROOT, prompts=2)
        with pytest.raises(VipoError) as caught:
            require_fit(config, ROOT, 2, found, 0)
        assert told in str(caught.value)
        assert saved not in str(caught.value)
        assert ("generator.weights" in str(caught.value)) == (config.distribution.strategy == "ddp")
        require_fit(config, ROOT, 2, found, math.inf)


ADAPTERS = """
from vipo.generators.flux import FluxGenerator

class Fine(FluxGenerator):
    pass

class Reads(FluxGenerator):
    def _predict(self, latents, time, conditioning):
        assert float(time[0]) >= 0
        return super()._predict(latents, time, conditioning)

class Raises(FluxGenerator):
    def _predict(self, latents, time, conditioning):
        raise RuntimeError("boom")
"""


def test_an_adapter_of_an_import_path_is_planned(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_planned.py").write_text(ADAPTERS)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = [*tiny_overrides, "arm=vipo", "training.lora={rank: 2, alpha: 2}"]

    def of(name: str) -> Plan:
        return plan(load_config([*chosen, f"generator.family=my_planned:{name}"]), ROOT, prompts=2)

    assert of("Fine") == plan(load_config(chosen), ROOT, prompts=2)
    with pytest.raises(VipoError, match="'my_planned:Reads': its calls depend on values"):
        of("Reads")
    with pytest.raises(VipoError, match="'my_planned:Raises' raised RuntimeError: boom"):
        of("Raises")
