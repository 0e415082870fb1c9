"""`vipo credit` on the tiny generator: what it writes, that it resumes, and what it refuses."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from vipo.audit import audit_experiment
from vipo.cli import app
from vipo.config.comparable import check_comparable
from vipo.config.compose import load_config, repository_root
from vipo.config.experiment import configured_arms
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.credit.meter.gradients import Chains, MeterError, total_gradient
from vipo.credit.meter.subject import Group, Subject, chain_rewards
from vipo.evaluation import meter as stage
from vipo.evaluation.meter_arms import Placement
from vipo.generators import load_generator
from vipo.objectives import group_advantages
from vipo.provenance import ProvenanceError, read_provenance, verify_outputs
from vipo.provenance.parts import load_json
from vipo.rewards import score
from vipo.rewards.resident import Resident
from vipo.stages import MEASURED, checkpoint_label, credit_stage
from vipo.training.setup import set_up
from vipo.training.update import update

ROOT = repository_root()
SMALL = [
    "experiment.meter.arms=[grpo,vipo,contrast,inverted]",
    "experiment.meter.updates=2",
    "experiment.meter.reference=2",
    "experiment.meter.blocks=2",
    "experiment.meter.stepped=1",
    "experiment.meter.held_out=2",
]


def _configs(overrides: Sequence[str], *more: str) -> dict[str, Config]:
    arms = load_config([*overrides, *SMALL, *more]).experiment.meter.arms
    return {name: load_config([*overrides, *SMALL, *more, f"arm={name}"]) for name in arms}


def _measure(results: Path, overrides: Sequence[str], *more: str, weights: Path | None = None) -> str:
    configs = _configs(overrides, *more)
    meter = next(iter(configs.values())).experiment.meter
    return credit_stage(configs, meter, ROOT, results, weights)


@pytest.fixture(scope="module")
def results(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(prepared, tmp_path_factory.mktemp("credit") / "results")


def test_it_measures_writes_and_goes_on(results: Path, tiny_overrides: list[str]) -> None:
    text = _measure(results, tiny_overrides)
    folder = results / "demo/credit/base"
    assert "2 updates, 2 reference batches" in text
    data = json.loads((folder / "credit.json").read_text())
    ratios = {
        along["source"]: along["ratio"]["value"] for along in data["result"]["pathwise"] if along["kind"] == "sgd"
    }
    assert list(ratios) == ["grpo", "vipo", "contrast", "inverted"]
    assert ratios["grpo"] == 1
    assert all(along["value"]["value"] is not None for along in data["result"]["directional"])
    assert (folder / "credit.svg").read_text().startswith("<?xml")
    record = read_provenance(folder / "provenance.json")
    assert record["stage"] == "credit"
    assert {Path(entry["path"]).name for entry in record["outputs"]} == {"credit.json", "credit.svg"}
    assert not verify_outputs(folder / "provenance.json", ROOT)
    audited = audit_experiment(results / "demo", ROOT)
    # No run is here, so of prompts and embeddings the audit has no configuration to compare with.
    assert {finding.artifact for finding in audited.findings if finding.severity == "broken"} <= {
        "prompts",
        "embeddings",
    }
    with pytest.raises(ProvenanceError, match="run again by 'vipo credit'"):
        audit_experiment(results / "demo", ROOT, rerun="credit/base")
    # Again: nothing is measured anew, and the bytes are the same.
    before = (folder / "credit.json").read_bytes()
    (parts,) = (folder / MEASURED).iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert {"update-0.json", "update-1.json", "reference-0.safetensors"} <= times.keys()
    _measure(results, tiny_overrides)
    assert (folder / "credit.json").read_bytes() == before
    # More updates go on from those that are there.
    _measure(results, tiny_overrides, "experiment.meter.updates=3")
    after = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert after.keys() - times.keys() == {"update-2.json"}
    assert {name: after[name] for name in times} == times
    assert json.loads((folder / "credit.json").read_text())["result"]["updates"] == 3
    # The measurement of fewer is set aside, its parts are not.
    (aside,) = (results / "demo/.superseded").glob("*/credit/base")
    assert (aside / "credit.json").read_bytes() == before
    assert not (aside / MEASURED).exists()
    # Measured from nothing it is the same.
    again = results.with_name("again")
    shutil.copytree(results, again, ignore=shutil.ignore_patterns("credit"))
    _measure(again, tiny_overrides, "experiment.meter.updates=3")
    assert (again / "demo/credit/base/credit.json").read_bytes() == (folder / "credit.json").read_bytes()


def test_a_damaged_part_is_measured_again_to_the_same_bytes(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = shutil.copytree(prepared, tmp_path / "results")
    small = ["experiment.meter.arms=[grpo,contrast]"]
    _measure(results, tiny_overrides, *small)
    whole = (results / "demo/credit/base/credit.json").read_bytes()
    (parts,) = (results / "demo/credit/base" / MEASURED).iterdir()
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    # Cut off, and of one a digit that leaves a number.
    (parts / "reference-0.safetensors").write_bytes(before["reference-0.safetensors"][:100])
    changed = bytearray(before["reference-1.safetensors"])
    changed[-1] ^= 1
    (parts / "reference-1.safetensors").write_bytes(changed)
    (parts / "update-0.json").write_text("[]")
    (parts / "update-1.json").write_bytes(before["update-1.json"][:50])
    (parts / "costs.json").write_text("[]")
    _measure(results, tiny_overrides, *small)
    assert (results / "demo/credit/base/credit.json").read_bytes() == whole
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == before
    told = [message for message in caplog.messages if "is damaged" in message]
    assert len(told) == 4
    assert all(any(name in line for line in told) for name in ("reference-0", "reference-1", "update-1", "costs"))


def test_a_runs_weights_are_a_checkpoint_of_their_own(results: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    generator = load_generator(load_config(tiny_overrides).generator, ROOT)
    with torch.no_grad():
        for value in generator.network.parameters():
            value.mul_(1.01)
    weights = tmp_path / "grpo-s0" / "updates" / "000012"
    weights.mkdir(parents=True)
    generator.save_network(weights)
    cheap = ["experiment.meter.stepped=0", "experiment.meter.directions=[sgd]", "experiment.meter.arms=[grpo,contrast]"]
    _measure(results, tiny_overrides, *cheap)
    base = json.loads((results / "demo/credit/base/credit.json").read_text())["result"]
    _measure(results, tiny_overrides, *cheap, weights=weights)
    own = json.loads((results / "demo/credit/grpo-s0-u12/credit.json").read_text())["result"]
    assert own["directional"] == []
    assert own["pathwise"] != base["pathwise"]
    lora = "training.lora={rank: 2, alpha: 2.0}"
    with pytest.raises(MeterError, match=r"holds no LoRA, which training\.lora asks for"):
        _measure(results, tiny_overrides, *cheap, lora, weights=weights)
    generator.add_lora(load_config([*tiny_overrides, lora]).training.lora, 0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    generator.save_network(adapter)
    with pytest.raises(MeterError, match=r"holds a LoRA, which a run without training\.lora does not train"):
        _measure(results, tiny_overrides, *cheap, weights=adapter)
    with pytest.raises(ConfigError, match="no such folder"):
        _measure(results, tiny_overrides, *cheap, weights=tmp_path / "none")
    assert not (results / "demo/credit/none").exists()
    assert checkpoint_label(Path("results/demo/runs/vipo-s1/weights")) == "vipo-s1"


def test_other_files_in_the_same_place_are_measured_anew(tiny_overrides: list[str], tmp_path: Path) -> None:
    """More updates go on from the parts that are there; those of other weights do not."""
    configs, network = _configs(tiny_overrides), tmp_path / "model.safetensors"
    meter = configs["grpo"].experiment.meter
    network.write_bytes(b"one")
    first = stage._identity(configs, meter, [network], {})
    assert stage._identity(configs, meter.model_copy(update={"updates": 9}), [network], {}) == first
    network.write_bytes(b"other")
    assert stage._identity(configs, meter, [network], {}) != first


def test_any_reward_has_the_directional_estimator(results: Path, tiny_overrides: list[str]) -> None:
    overrides = [*tiny_overrides, "reward=scene", "experiment.meter.directions=[sgd]", "experiment.meter.change=1.0e-3"]
    text = _measure(results, overrides, "experiment.meter.reference=0", "experiment.meter.updates=1")
    assert "directional" in text
    assert "pathwise:" not in text
    with pytest.raises(MeterError, match=r"'scene' has no gradient by the picture; set experiment\.meter\.reference=0"):
        _measure(results, overrides)


def test_terms_of_one_reward_are_told_apart(results: Path, tiny_overrides: list[str]) -> None:
    """By their labels, as in training: the term that a source names is one of them too."""
    # What is measured and not rewarded needs no gradient.
    terms = (
        "[{name: object_redness, label: one}, {name: object_redness, label: other, weight: -1.0}, redness, "
        "{name: scene_shape, weight: 0.0}]"
    )
    more = ["stepped=0", "directions=[sgd]", "updates=1"]
    config = load_config(
        [
            *tiny_overrides,
            "arm=vipo",
            "credit.sources=[{name: reward, term: other}]",
            f"reward.terms={terms}",
            *SMALL,
            *(f"experiment.meter.{end}" for end in more),
        ]
    )
    parts = results / "labels"
    stage.measure_credit({"vipo": config}, config.experiment.meter, ROOT, results / "demo", parts, None)
    (path,) = parts.glob("*/update-0.json")
    rewards = load_json(path)["rewards"]
    assert list(rewards) == ["one", "other", "redness", "scene_shape"]
    assert rewards["one"] == rewards["other"]


def test_gradients_that_do_not_fit_are_sketched_and_those_of_lora_fit(
    results: Path, tiny_overrides: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    cheap = ["experiment.meter.stepped=0", "experiment.meter.directions=[sgd]", "experiment.meter.updates=1"]
    lora = _measure(
        results, tiny_overrides, *cheap, "experiment.meter.memory_mb=1", "training.lora={rank: 2, alpha: 2.0}"
    )
    assert "1 updates, 2 reference batches" in lora
    assert "whole gradients: 14 of" in caplog.text
    sketched = _measure(results, tiny_overrides, *cheap, "experiment.meter.memory_mb=1")
    assert "1 updates, 2 reference batches" in sketched
    assert "are sketched to" in caplog.text
    # Before the reference, the longest part.
    monkeypatch.setattr(stage, "measure_reference", None)
    with pytest.raises(MeterError, match="memory_mb"):
        _measure(results, tiny_overrides, *cheap[:1], cheap[2], "experiment.meter.memory_mb=1")


def test_what_cannot_be_compared_is_named(
    results: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before prompts and embeddings are made.
    monkeypatch.setattr("vipo.stages.credit.make_missing", None)
    with pytest.raises(ConfigError, match=r"'flow_grpo' differs from 'grpo' in more than its credit \(sampling"):
        _measure(results, tiny_overrides, "experiment.meter.arms=[grpo,flow_grpo]")
    with pytest.raises(ConfigError, match="'base' is not trained and has no direction; leave it out"):
        _measure(results, tiny_overrides, "experiment.meter.arms=[grpo,base]")
    with pytest.raises(ConfigError, match="'nft' has the objective 'nft', whose gradient is not the surrogate's"):
        _measure(results, tiny_overrides, "experiment.meter.arms=[grpo,nft]")
    grpo = load_config([*tiny_overrides, "arm=grpo"])
    for chosen, told in (
        ("objective.density=squared_error", "'vipo' has objective.density 'squared_error' and 'grpo' 'gaussian'"),
        ("objective.ratio_norm=guard", "'vipo' weights its steps by objective.ratio_norm 'guard'"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_comparable({"grpo": grpo, "vipo": load_config([*tiny_overrides, "arm=vipo", chosen])})
    with pytest.raises(ConfigError, match="leave nothing to measure"):
        _configs(tiny_overrides, "experiment.meter.reference=0", "experiment.meter.stepped=0")
    with pytest.raises(ConfigError, match="named twice"):
        _configs(tiny_overrides, "experiment.meter.arms=[grpo,grpo]")
    config = load_config([*tiny_overrides, "arm=vipo"])
    with pytest.raises(ConfigError, match="contrast: no resolved configuration beside"):
        configured_arms(tmp_path / "vipo-s0.yaml", config, ["vipo", "contrast"])


def test_advantages_are_placed_as_training_places_them(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scalar for GRPO; the backbone's own map times it for ViPO; siblings' differences times it for contrast."""
    seen: dict[str, object] = {}
    placed = stage.place_advantages

    def kept(subject: Subject, arms: dict, groups: Sequence[Group]) -> Placement:
        found = placed(subject, arms, groups)
        seen.update(subject=subject, arms=arms, groups=groups, found=found.values)
        return found

    monkeypatch.setattr(stage, "place_advantages", kept)
    results = shutil.copytree(prepared, tmp_path / "results")
    cheap = ["experiment.meter.stepped=0", "experiment.meter.directions=[sgd]", "experiment.meter.updates=1"]
    text = _measure(results, tiny_overrides, *cheap, "experiment.meter.arms=[grpo,vipo,contrast,step_tweedie]")
    subject, groups, found = seen["subject"], seen["groups"], seen["found"]
    counted = json.loads((results / "demo/credit/base/credit.json").read_text())["result"]["costs"]
    assert counted == {
        "grpo": {}, "vipo": {"backbone_calls": 1}, "contrast": {}, "step_tweedie": {"decodes": 3, "reward_calls": 3},
    }  # fmt: skip
    assert "backbone calls" in text
    batches = [batch for group in groups for batch in group.batches]
    index = torch.tensor([0] * 4 + [1] * 4)
    scalar = group_advantages(chain_rewards(subject, batches), {"object_redness": 1.0}, index, 1e-4, 5.0).values
    assert found["grpo"].shape == (8, 1, 1, 1)
    assert torch.equal(found["grpo"].flatten(), scalar)
    structuring = seen["arms"]["vipo"].sources["backbone"].structuring
    pictures = torch.cat([subject.generator.pictures(batch.trajectory.clean) for batch in batches])
    maps = structuring(pictures, subject.generator.grid).maps
    torch.testing.assert_close(found["vipo"][:, 0], maps * scalar[:, None, None])
    clean = torch.cat([batch.trajectory.clean for batch in batches])
    own = (clean[4:] - clean[4:].mean(dim=0)).square().mean(dim=1).sqrt()
    own = own / own.mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(found["contrast"][4:, 0], own * scalar[4:, None, None])
    # Of the first transition: the reward of x0 before it, by a call of the network, and after it.
    gains = []
    for batch in batches:
        values = []
        for step in (0, 1):
            x, sigma = batch.trajectory.latents[:, step], subject.chain.levels[step]
            with torch.no_grad():
                velocity = subject.generator.predict(x, sigma.expand(len(x)), batch.conditioning)
            pictures = subject.generator.pictures(x - sigma * velocity)
            values.append(score("one", subject.rewards["object_redness"], pictures, batch.texts, batch.metadata))
        gains.append((values[1] - values[0]).double())
    expected = group_advantages({"one": torch.cat(gains)}, {"one": 1.0}, index, 1e-4, 5.0).values
    assert found["step_tweedie"].shape == (8, 3, 1, 1)
    torch.testing.assert_close(found["step_tweedie"][:, 0].flatten(), expected, rtol=1e-2, atol=1e-2)


def test_the_measured_update_is_the_trained_one(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its best and worst samples, and its first transitions, where training learns from no others."""
    seen: list[torch.Tensor] = []
    placed = stage.place_advantages

    def kept(subject: Subject, arms: dict, groups: Sequence[Group]) -> Placement:
        found = placed(subject, arms, groups)
        seen.append(found.values["grpo"].flatten())
        return found

    monkeypatch.setattr(stage, "place_advantages", kept)
    cheap = ["experiment.meter.stepped=0", "experiment.meter.directions=[sgd]", "experiment.meter.updates=1"]
    cheap += ["experiment.meter.reference=2", "experiment.meter.arms=[grpo]"]
    cheap += ["training.trained_transitions=1", "training.optimizer_steps_per_update=1"]
    found = []
    for number, own in enumerate(([], ["training.best_of=2"], ["training.transition_choice=first"])):
        results = shutil.copytree(prepared, tmp_path / f"{number}")
        _measure(results, tiny_overrides, *cheap, *own)
        [part] = (results / "demo/credit/base" / MEASURED).glob("*/update-0.json")
        found.append(list(load_json(part)["sources"]["grpo"]["steps"]))
    every, best, _ = seen
    for group, chosen in zip(every.split(4), best.split(4), strict=True):
        order = group.argsort(descending=True, stable=True)
        expected = torch.zeros(4)
        expected[order[[0, -1]]] = 2 * group[order[[0, -1]]]
        assert torch.equal(chosen, expected)
    assert found == [["0", "1", "2"], ["0", "1", "2"], ["0"]]


def test_a_rewards_network_is_in_use_while_a_batch_is_scored_and_differentiated(
    prepared: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is read once for a gradient, and once for all batches that are scored together."""
    reads: list[str] = []

    def read() -> torch.nn.Module:
        reads.append("read")
        return torch.nn.LayerNorm(3)

    class Whiteness:
        resident = Resident(read, "cpu", "free")

        def __call__(self, pictures: torch.Tensor, texts: Sequence[str], metadata: object) -> torch.Tensor:
            with self.resident as network:
                uses.append(self.resident._uses)
                return network(pictures.movedim(1, -1)).flatten(1)[:, 0]

    uses: list[int] = []
    subject = object.__new__(Subject)
    generator = load_generator(load_config(tiny_overrides).generator, ROOT)
    object.__setattr__(subject, "generator", generator)
    object.__setattr__(subject, "rewards", {"white": Whiteness()})
    clean = torch.randn(2, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    batch = Chains((0, 1), {}, SimpleNamespace(clean=clean), ["a", "b"], [{}, {}])
    assert chain_rewards(subject, [batch, batch])["white"].shape == (4,)
    assert (reads, uses) == (["read"], [2, 2])
    gradient = total_gradient(generator, batch, subject.rewards, {"white": 1.0})
    assert (reads, uses) == (["read"] * 2, [2] * 3)
    assert bool((gradient != 0).any())


def test_arms_of_contrast_train(prepared: Path, tiny_overrides: list[str]) -> None:
    for arm in ("contrast", "product", "shuffled_contrast"):
        metrics = update(set_up(load_config([*tiny_overrides, f"arm={arm}"]), ROOT, prepared / "demo"), 1)
        assert metrics["map/mean"] == pytest.approx(1, rel=1e-5)
        assert 0 < metrics["map/entropy"] < 1


def test_the_pages_commands(results: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    """docs/credit.md as it stands, on the tiny generator and with less of everything."""
    page = (ROOT / "docs/credit.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("vipo credit ")]
    assert len(commands) == 3
    generator = load_generator(load_config(tiny_overrides).generator, ROOT)
    kept = shutil.copytree(results, tmp_path / "results")
    (weights := kept / "demo/runs/grpo-s0/weights").mkdir(parents=True)
    generator.save_network(weights)
    less = ["updates=1", "reference=2", "stepped=1", "held_out=2", "change=1.0e-3", "directions=[sgd]"]
    for _, _, *given in commands:
        own = [text for text in given if text != "experiment=demo"]
        named = {text.partition("=")[0] for text in own}
        rest = [text for text in (f"experiment.meter.{end}" for end in less) if text.partition("=")[0] not in named]
        own = [str(weights) if text == "results/demo/runs/grpo-s0/weights" else text for text in own]
        done = CliRunner().invoke(app, ["credit", *tiny_overrides, *rest, *own, "--results", str(kept)])
        assert done.exit_code == 0, done.output
        assert "ratio to grpo" in done.output
    assert {path.name for path in (kept / "demo/credit").iterdir()} >= {"base", "grpo-s0"}


def test_it_is_a_stage_of_an_experiment_that_asks_for_it(tmp_path: Path) -> None:
    """The page's command as a plan: the measurement comes before the crate, which describes it."""
    page = (ROOT / "docs/credit.md").read_text(encoding="utf-8")
    (command,) = [shlex.split(line) for line in page.splitlines() if line.startswith("snakemake ")]
    for name in ("Snakefile", "workflow", "configs", "data", "local", "vipo"):
        (tmp_path / name).symlink_to(ROOT / name)

    def planned(*changed: str) -> str:
        words = [*command[:-1], *(changed or command[-1:])]
        # One process, and only its plan.
        done = subprocess.run([*words, "-n", "-p"], cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    text = planned()
    assert "rule credit:" in text, text
    assert "credit/base/credit.json" in text.split("rule crate:")[1].split("output:")[0]
    assert "not among experiment.arms" in planned("overrides=[experiment.meter.arms=[grpo,contrast]]")
    told = planned("overrides=[+experiment.arms.nft.seeds=[0],experiment.meter.arms=[grpo,nft]]")
    assert "'nft' has the objective 'nft', whose gradient is not the surrogate's" in told, told
    text = planned("overrides=[distribution.processes=2,training.micro_batch=4,experiment.meter.arms=[grpo,vipo]]")
    asked = [text.split(f"rule {rule}:")[1].split("cpus_per_task=")[1].split(",")[0] for rule in ("train", "credit")]
    assert asked == ["2", "1"]
    more = "experiment.meter.checkpoints=[base,grpo-s0@12,grpo-s0]"
    text = planned(f"overrides=[experiment.meter.arms=[grpo,vipo],{more}]")
    assert "--weights results/demo/runs/grpo-s0/updates/000012" in text, text
    shown = text.split("rule report:")[1].split("output:")[0]
    assert all(f"credit/{label}/credit.json" in shown for label in ("base", "grpo-s0-u12", "grpo-s0"))
    assert "rule credit:" not in planned("overrides=[]")
