"""`vipo plan`: counted by hand on the tiny generator, and refused where a device is too small."""

import functools
import json
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from reward_checkpoints import write_clip
from safetensors.torch import load_file

from vipo.cli import app
from vipo.config.compose import load_config, repository_root
from vipo.errors import VipoError
from vipo.generators import load_generator
from vipo.perception import PerceptualStructuring, load_backbone
from vipo.training.fit import require_fit
from vipo.training.peak import peak_bytes
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


def test_buffers_are_counted(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Of SD3 the positions of the largest picture: each process has them whole, and a reference has its own."""
    folder = FAMILIES["sd3"].write(tmp_path / "sd3")
    chosen = [*tiny_overrides, "arm=vipo", "generator.family=sd3", f"generator.path={folder}"]
    found = [
        plan(load_config([*chosen, *more]), ROOT, prompts=2)
        for more in ([], ["objective.kl_weight=0.1"], ["distribution={strategy: fsdp, processes: 2}"])
    ]
    settings = json.loads((folder / "transformer/config.json").read_text())
    positions = settings["pos_embed_max_size"] ** 2 * settings["num_attention_heads"] * settings["attention_head_dim"]
    assert [each.held["network's buffers"] for each in found] == [4 * positions, 8 * positions, 4 * positions]


def test_activations_are_those_of_the_device(tiny_overrides: list[str]) -> None:
    """Autocast on CUDA computes norms in fp32, also where blocks are computed again; on a CPU it does not."""
    chosen = [*tiny_overrides, "arm=grpo", "generator.precision=bf16"]
    for more in ([], ["training.gradient_checkpointing=true"]):
        on_cpu, on_gpu = (
            plan(load_config([*chosen, *more, f"generator.device={device}"]), ROOT, prompts=2)
            for device in ("cpu", "cuda")
        )
        assert on_gpu.phases["learns"] > on_cpu.phases["learns"]
        assert on_gpu.phases["rolls out"] > on_cpu.phases["rolls out"]
        assert on_gpu.held == on_cpu.held


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
    # The packaged backbone is larger than the tiny generator.
    assert re.search(r"^peak \(while it maps\) +\d+\.\d\d GiB$", shown, re.MULTILINE)
    assert re.search(r"^an update at 2 TFLOP/s +\d", shown, re.MULTILINE)
    assert found["uncounted"] == []
    assert re.search(r"^backbone +\d+\.\d\d GiB$", shown, re.MULTILINE)
    assert re.search(r"^while it maps +\d+\.\d\d GiB$", shown, re.MULTILINE)
    command.append("arm=grpo")
    app([*command, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
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


def test_the_backbone_is_counted_as_it_is(tiny_overrides: list[str]) -> None:
    """Its bytes are the loaded one's, and a call takes what the same call takes with data."""
    for more in ([], ["perception.precision=bf16", "training.micro_batch=2"]):
        config = load_config([*tiny_overrides, "arm=vipo", *more])
        found, generator = plan(config, ROOT, prompts=2), load_generator(config.generator, ROOT)
        backbone = load_backbone(config.perception)
        assert found.held["backbone"] == bytes_of(backbone)
        structuring = PerceptualStructuring(backbone, config.perception)
        pictures = torch.rand(config.training.micro_batch, *config.generator.sample_shape)
        with torch.no_grad():
            taken = peak_bytes(
                nullcontext(), [backbone], [pictures], functools.partial(structuring, pictures, generator.grid)
            )
        samples = config.training.prompts_per_update * config.training.group_size
        assert found.phases["maps"] == taken + samples * pictures[0].nbytes
    # A source that compares features has a backbone of its own.
    both = "credit.sources=[{name: backbone}, {name: contrast, of: features}]"
    twice = plan(load_config([*tiny_overrides, "arm=vipo", both]), ROOT, prompts=2)
    assert twice.held["backbone"] == 2 * plan(load_config([*tiny_overrides, "arm=vipo"]), ROOT, 2).held["backbone"]
    assert twice.uncounted == ("features that the source contrast compares",)
    without = plan(load_config([*tiny_overrides, "arm=grpo"]), ROOT, prompts=2)
    assert "backbone" not in without.held
    assert "maps" not in without.phases


def bytes_of(module: torch.nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def test_networks_of_rewards_are_counted_where_they_are(tiny_overrides: list[str], tmp_path: Path) -> None:
    def of(*terms: str) -> Plan:
        return plan(load_config([*tiny_overrides, "arm=grpo", f"reward.terms=[{', '.join(terms)}]"]), ROOT, 2)

    write_clip(tmp_path / "clip")
    size = sum(value.nbytes for value in load_file(tmp_path / "clip/model.safetensors").values())
    clip = f"{{name: clipscore, label: %s, options: {{path: {tmp_path / 'clip'}, dtype: %s, resident: %s}}}}"
    none = of("redness")
    assert (none.held.get("rewards"), none.phases.get("scores"), none.uncounted) == (None, None, ())
    kept = of(clip % ("a", "fp32", "keep"), clip % ("b", "bf16", "keep"), "redness")
    assert kept.held["rewards"] == size + size // 2
    assert kept.uncounted == ("what the rewards' networks make while they score",)
    moved = of(clip % ("a", "fp32", "offload"), clip % ("b", "bf16", "free"), clip % ("c", "bf16", "keep"))
    assert moved.held["rewards"] == size // 2
    # One of them is there at a time.
    assert moved.phases["scores"] - kept.phases["scores"] == size
    served = f"{{name: process, options: {{reward: redness, environment: {sys.executable}%s}}}}"
    assert of(served % ", device: cpu").uncounted == ()
    assert of(served % "").uncounted == ("reward process (a process of its own on the generator's device)",)
    absent = of("my_rewards:mine", f"{{name: clipscore, options: {{path: {tmp_path / 'none'}}}}}").uncounted
    assert absent[0] == "reward my_rewards:mine (others' code)"
    assert absent[1].startswith("reward clipscore (reward 'clipscore' raised RewardError: path '")


def test_gradients_are_told_apart(tiny_overrides: list[str]) -> None:
    found = plan(load_config([*tiny_overrides, "arm=grpo"]), ROOT, prompts=2)
    assert found.gradients == 4 * found.trained < found.phases["learns"]
    offload = "distribution={strategy: fsdp, offload: true}"
    other = plan(load_config([*tiny_overrides, "arm=grpo", offload]), ROOT, prompts=2)
    assert (other.gradients, other.main["gradients"]) == (0, found.gradients)


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
