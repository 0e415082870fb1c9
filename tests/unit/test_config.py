"""Configuration: composition, validation and the messages a user reads."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vipo.cli import _expanded
from vipo.config.compose import (
    dump_config,
    load_config,
    load_config_file,
    repository_root,
    validate_config,
    write_if_changed,
)
from vipo.config.experiment import arms_beside, check_run, check_runs
from vipo.config.renamed import RENAMED
from vipo.config.resolved import read_mapping, to_yaml
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.config.values import config_hash
from vipo.text import visible

DEMO = "experiment=demo"
ARMS = ("base", "grpo", "product", "vipo", "inverted")


@pytest.fixture(scope="module")
def demo() -> Config:
    return load_config([DEMO])


def _edited(config: Config, key: str, value: Any) -> dict[str, Any]:
    data = OmegaConf.create(config.model_dump(mode="json"))
    OmegaConf.update(data, key, value)
    plain = OmegaConf.to_container(data)
    assert isinstance(plain, dict)
    return {str(name): section for name, section in plain.items()}


def _as(config: Config, key: str, value: Any) -> Config:
    return validate_config(_edited(config, key, value))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_of_the_demo_composes(arm: str) -> None:
    config = load_config([DEMO, f"arm={arm}", "seed=1"])
    assert config.run_name == f"{arm}-s1"
    assert config.is_base == (arm == "base")
    assert set(config.experiment.arms) == set(ARMS)


# What each arm of `configs/arm` is, beside what the experiment gives all arms; credit and `ratio` are never left out.
BACKBONE = [{"name": "backbone"}]
CONTRAST = {"name": "contrast", "of": "latents", "scope": "sample", "exponent": 1.0, "normalize": "mean"}
POSITION = {"objective.ratio": "position", "credit.sources": BACKBONE}
DECISIVE: dict[str, dict[str, Any]] = {
    "base": {},
    "grpo": {"objective.ratio": "sample", "credit.sources": []},
    "flow_grpo": {
        "objective.ratio": "sample",
        "credit.sources": [],
        "advantages.combine": "rewards",
        "advantages.std": "batch",
        "objective.kl_weight": 0.04,
        "sampling.transition": "flow",
        "sampling.eta": 0.7,
        "sampling.same_initial_noise": False,
    },
    "vipo": POSITION,
    "vipo_mean": {**POSITION, "perception.normalize": "mean"},
    "vipo_paper": {
        **POSITION,
        "objective.gate.name": "ppo",
        "objective.gate.scope": "position",
        "objective.gate.range": 2.6e-2,
    },
    "divergence": {
        "objective.ratio": "sample",
        "credit.sources": [],
        "objective.gate.name": "divergence",
        "objective.gate.scope": "sample",
        "objective.gate.bound": 1e-5,
    },
    # Their defaults are their codes': test_forward_objectives.py.
    "nft": {"objective.name": "nft", "objective.kl_weight": 1e-4, "credit.sources": []},
    "awm": {"objective.name": "awm", "objective.kl_weight": 3e-3, "credit.sources": []},
    "reward_map": {**POSITION, "credit.multiplies": "reward"},
    "average": {**POSITION, "perception.aggregation": "average"},
    "first": {**POSITION, "perception.aggregation": "first"},
    "uniform": {"objective.ratio": "position", "credit.sources": [{"name": "uniform"}]},
    "oracle": {
        "objective.ratio": "position",
        "credit.sources": [{"name": "oracle", "exponent": 1.0, "floor": 0.0, "normalize": "minmax"}],
    },
    "contrast": {"objective.ratio": "position", "credit.sources": [CONTRAST]},
    "product": {
        "objective.ratio": "position",
        "credit.sources": [*BACKBONE, CONTRAST],
        "perception.normalize": "mean",
    },
    "attention": {
        "objective.ratio": "position",
        "credit.sources": [{"name": "attention", "layers": 4, "exponent": 1.0, "normalize": "mean"}],
    },
    **{
        f"step_{estimate}": {"objective.ratio": "sample", "credit.sources": [], "credit.steps": estimate}
        for estimate in ("tweedie", "ode")
    },
    "released_flux": {
        "objective.ratio": "sample",
        "objective.gate.range": 1e-4,
        "credit.sources": BACKBONE,
        "credit.control": "mean",
        "perception.orientation": "inverted_sklearn",
        "advantages.std_floor": 1e-8,
    },
    "released_wan": {
        **POSITION,
        "objective.channels": "sum",
        "objective.gate.scope": "position",
        "objective.gate.range": 1e-4,
        "perception.orientation": "inverted_sklearn",
        "advantages.std_floor": 1e-8,
    },
    "shuffled_contrast": {
        "objective.ratio": "position",
        "credit.sources": [CONTRAST],
        "credit.control": "shuffled",
    },
    **{
        arm: {**POSITION, "credit.control": kind}
        for arm, kind in {
            "inverted": "inverted",
            "mean_map": "mean",
            "group_map": "group",
            "shuffled": "shuffled",
        }.items()
    },
    **{f"k{k}": {**POSITION, "perception.components": k} for k in range(1, 6)},
    **{f"sigma{sigma:g}": {**POSITION, "perception.smoothing": sigma} for sigma in (0.0, 0.5, 2.0)},
    **{
        f"backbone_{name}": {
            **POSITION,
            "perception.backbone": backbone,
            # The demo's are those of its own backbone.
            "perception.layer": None,
            "perception.input_size": None,
        }
        for name, backbone in {
            "dinov2": "vit_large_patch14_dinov2.lvd142m",
            "dinov3": "vit_large_patch16_dinov3.lvd1689m",
            "efficientnet": "efficientnet_lite0",
            "resnet50": "resnet50.a1_in1k",
            "sam": "samvit_base_patch16.sa1b",
            "siglip2": "vit_base_patch16_siglip_gap_224.v2_webli",
        }.items()
    },
}


_DECIDING = ("credit", "advantages", "objective", "sampling", "perception")


def _flat(config: Config) -> dict[str, Any]:
    data = config.model_dump(mode="json", exclude={"arm", "experiment"})
    return {".".join(path): value for path, value in _leaves(data, ()) if path[0] in _DECIDING} | {
        "rest": {k: v for k, v in data.items() if k not in _DECIDING}
    }


def _leaves(data: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(data, dict):
        return [(path, data)]
    return [leaf for key, value in data.items() for leaf in _leaves(value, (*path, key))]


def test_every_arm_file_is_known_here() -> None:
    files = {path.stem for path in (repository_root() / "configs/arm").glob("*.yaml")}
    assert files == set(DECISIVE)


@pytest.mark.parametrize("arm", DECISIVE)
def test_an_arm_is_what_its_name_claims_and_nothing_else(demo: Config, arm: str) -> None:
    """Composed with the demo, it differs from `vipo` there in its decisive keys alone."""
    assert demo.arm == "vipo"
    config, plain = load_config([DEMO, f"arm={arm}"]), _flat(demo)
    assert config.arm == arm
    found = _flat(config)
    assert {key: found[key] for key in DECISIVE[arm]} == DECISIVE[arm]
    # Another objective or gate has other options.
    assert {key for key in plain if found.get(key, plain[key]) != plain[key]} <= set(DECISIVE[arm])
    assert config.credit.reads_backbone == ("backbone" in config.credit.names)


def test_an_arm_s_keys_win_over_the_experiment_s() -> None:
    """The demo names gate.scope, transition noise and backbone; the arm that is defined by them keeps its own."""
    assert load_config([DEMO]).objective.gate.scope == "sample"
    paper = load_config([DEMO, "arm=vipo_paper"])
    assert (paper.objective.gate.scope, paper.objective.gate.range) == ("position", 2.6e-2)
    assert load_config([DEMO, "arm=flow_grpo", "sampling.shift=5"]).sampling.shift == 5
    assert (load_config([DEMO]).perception.layer, load_config([DEMO]).perception.input_size) == (2, 96)
    for sam in (load_config([DEMO, "arm=backbone_sam"]).perception, load_config([DEMO, "perception=sam"]).perception):
        assert (sam.backbone, sam.layer, sam.input_size) == ("samvit_base_patch16.sa1b", None, None)
    # What the experiment says of this arm comes after the arm's file, what the caller says comes last.
    own = "++experiment.arms.vipo_paper={overrides: ['objective.gate.range=0.5', 'objective.gate.name=symmetric']}"
    gate = load_config([DEMO, own, "arm=vipo_paper", "objective.gate.name=ppo"]).objective.gate
    assert (gate.name, gate.scope, gate.range) == ("ppo", "position", 0.5)


EXPERIMENTS = sorted(path.stem for path in (repository_root() / "configs/experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_of_every_experiment_composes(name: str) -> None:
    # Recipes leave their prompts to the user.
    given = [f"experiment={name}", "prompts.source=prompts.txt"]
    first = load_config(given)
    assert first.experiment.name == name
    for arm in first.experiment.arms:
        config = load_config([*given, f"arm={arm}"])
        assert config.arm == arm
        assert config.experiment == first.experiment


def test_the_backbones_of_table_3_are_one_experiment() -> None:
    arms = load_config(["experiment=ablation_backbones"]).experiment.arms
    backbones = {path.stem for path in (repository_root() / "configs/arm").glob("backbone_*.yaml")}
    assert set(arms) == {"base", "grpo", "vipo", *backbones}
    # One whose weights are not to be had is left out; another has them in a folder.
    local = "++experiment.arms.backbone_sam.overrides=['perception.weights=weights/sam']"
    config = load_config(
        ["experiment=ablation_backbones", "~experiment.arms.backbone_dinov3", local, "arm=backbone_sam"]
    )
    assert config.perception.weights == "weights/sam"
    assert set(config.experiment.arms) == set(arms) - {"backbone_dinov3"}


@pytest.mark.parametrize("name", ["ablation", "ablation_backbones"])
def test_the_paper_s_settings_are_a_setup(name: str) -> None:
    """As the paper gives them for FLUX.1-dev; nothing of the demo's setup is left."""
    with pytest.raises(ConfigError, match=r"prompts\.source: missing"):
        load_config([f"experiment={name}", "setup=flux_paper"])
    config = load_config([f"experiment={name}", "setup=flux_paper", "prompts.source=prompts.txt"])
    found = {".".join(path): value for path, value in _leaves(config.model_dump(mode="json"), ())}
    expected: dict[str, Any] = {
        "generator.path": "black-forest-labs/FLUX.1-dev",
        "generator.height": 512,
        "generator.width": 512,
        "generator.guidance_scale": 3.5,
        "perception.backbone": "vit_large_patch14_dinov2.lvd142m",
        "perception.components": 3,
        "perception.aggregation": "variance",
        "perception.smoothing": 1.0,
        "sampling.steps": 8,
        "sampling.shift": 3.0,
        "sampling.transition": "dance",
        "sampling.eta": 0.3,
        "sampling.same_initial_noise": True,
        "objective.channels": "mean",
        "advantages.clip": 5.0,
        "objective.gate.name": "ppo",
        "objective.gate.scope": "sample",
        "objective.gate.range": 1e-4,
        "objective.kl_weight": 0.0,
        "advantages.std": "group",
        "optimizer.learning_rate": 1e-5,
        "optimizer.weight_decay": 1e-4,
        "optimizer.max_grad_norm": 1.0,
        "training.updates": 300,
        "training.prompts_per_update": 8,
        "training.group_size": 12,
        "training.optimizer_steps_per_update": 3,
        "training.epochs": 1,
        "training.transition_choice": "per_sample",
        # int(timestep fraction (T - 1))
        "training.trained_transitions": int(0.6 * 7),
        "pretrain": None,
    }
    assert {key: found[key] for key in expected} == expected
    demo = load_config([f"experiment={name}"])
    assert config.evaluation.rewards != demo.evaluation.rewards


@pytest.mark.parametrize(
    ("generator", "times"),
    [
        ("demo", 13),
        ("demo_text", 128**0.5),
        ("demo_video", 192**0.5),
        ("flux_dev", 64),
        ("stable_diffusion", 64),
        ("sd35_medium", 64),
        ("sd35_large", 64),
        ("sdxl", 128),
        ("cogvideox", (13 * 60 * 90) ** 0.5),
        ("flux2_klein", 64),
        ("flux2_dev", 64),
        ("qwen_image", 64),
        ("qwen_image_21", 32),
        ("z_image", 64),
        ("sana", 32),
        ("hunyuan_video", (16 * 30 * 52) ** 0.5),
        ("ltx2", (16 * 16 * 24) ** 0.5),
        ("wan", (14 * 30 * 52) ** 0.5),
        ("wan22_ti2v", (13 * 30 * 52) ** 0.5),
    ],
)
def test_the_gate_of_positions_has_its_range_on_the_scale_of_their_ratios(generator: str, times: float) -> None:
    """Whatever experiment composes `vipo_paper`: about sqrt(positions) times the range of a sample."""
    own = generator.startswith("demo")
    base = [f"experiment={generator}"] if own else ["experiment=ablation", "setup=flux_paper", "prompts.source=p.txt"]
    ranges = {
        arm: load_config([*base, f"generator={generator}", f"arm={arm}"]).objective.gate.range
        for arm in ("vipo", "vipo_paper")
    }
    assert ranges["vipo_paper"] / ranges["vipo"] == pytest.approx(times, rel=0.01)


def test_every_generator_has_the_range_of_positions() -> None:
    configs = repository_root() / "configs"
    ranges = {path.stem for path in (configs / "clip_range/vipo_paper").glob("*.yaml")}
    assert ranges == {path.stem for path in (configs / "generator").glob("*.yaml")}


def test_overrides_are_applied_last_and_typed() -> None:
    config = load_config([DEMO, "optimizer.learning_rate=2e-5", "training.lora.rank=4"])
    assert config.optimizer.learning_rate == 2e-5
    assert config.training.lora is not None
    assert config.training.lora.rank == 4


def test_an_arm_s_own_overrides_hold_for_it_alone_and_yield_to_the_caller() -> None:
    own = "++experiment.arms.vipo.overrides=['training.threads=3']"
    assert load_config([DEMO, own, "arm=vipo"]).training.threads == 3
    assert load_config([DEMO, own, "arm=grpo"]).training.threads == 1
    assert load_config([DEMO, own, "arm=vipo", "training.threads=2"]).training.threads == 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        # Typos: the key, what was meant, what is allowed.
        (["training.group_sizes=4"], ["training.group_sizes", "unknown key", "'group_size'", "micro_batch"]),
        (["trainin.updates=3"], ["trainin", "unknown key", "'training'", "evaluation"]),
        (["sed=3"], ["sed", "unknown key", "'seed'", "evaluation"]),
        (
            ["reward.terms=[{name: redness, wieght: 2}]"],
            ["reward.terms.0.wieght", "'weight'", "allowed: frames, label, name, options, weight"],
        ),
        (
            ["training.lora={rank: 4, alhpa: 3}"],
            ["training.lora.alhpa", "'alpha'", "allowed: alpha, init, rank, targets"],
        ),
        (["experiment.arms.vipo.seed=[3]"], ["experiment.arms.vipo.seed", "'seeds'", "overrides"]),
        # Wrong types: nothing is coerced.
        (["training.group_size=many"], ["training.group_size", "integer", "'many'"]),
        (["training.group_size='8'"], ["training.group_size", "integer", "'8'"]),
        (["training.group_size=8.5"], ["training.group_size", "integer", "8.5"]),
        (["seed=true"], ["seed", "integer", "True"]),
        (["evaluation.rewards=redness"], ["evaluation.rewards", "'redness'"]),
        (["generator.path=null"], ["generator.path", "string", "None"]),
        (["objective.gate=3"], ["objective.gate: expected a mapping such as {name: ppo}, got 3"]),
        # Values outside their range or set.
        (["training.group_size=1"], ["training.group_size", "greater than or equal to 2", "1"]),
        (["perception.components=9"], ["perception.components", "less than or equal to 8", "9"]),
        (["optimizer.learning_rate=nan"], ["optimizer.learning_rate", "finite", "nan"]),
        (
            ["objective.gate.name=both"],
            ["objective.gate.name", "'both'", "ppo, symmetric, divergence, none", "package.module:object"],
        ),
        (
            ["credit.sources=[{name: oracl}]"],
            ["credit.sources.0.name", "did you mean 'oracle'", "package.module:object"],
        ),
        (["objective.name=surogate"], ["objective.name", "did you mean 'surrogate'"]),
        # A part's keys are its own.
        (["objective.gate.nmae=ppo"], ["objective.gate.nmae", "'name'", "allowed: name, range, range_above, scope"]),
        (["objective.gate.name=none"], ["objective.gate.range: unknown key; allowed: name"]),
        (
            ["credit.sources=[{name: uniform}, {name: oracle, flor: 0.1}]"],
            ["credit.sources.1.flor", "'floor'", "allowed: exponent, floor, name, normalize"],
        ),
        (["credit.sources=[{nme: oracle}]"], ["credit.sources.0.name: missing", "allowed: name"]),
        (["credit.sources=[{name: oracle}, {name: oracle}]"], ["credit", "oracle, oracle"]),
        (["credit.sources=[backbone]"], ["credit.sources.0", "{name: backbone}"]),
        # What is said elsewhere now.
        (["objective=default"], ["objective: expected", "{name: surrogate}, got 'default'; or leave it out"]),
        (["objective.map=none"], ["objective.map: is said elsewhere now", "credit.sources", "credit.control"]),
        (["objective.map_on=reward"], ["objective.map_on", "credit.multiplies"]),
        (["objective.clip.side=none"], ["objective.clip", "objective.gate.name"]),
        (["objective.advantage_clip=3"], ["objective.advantage_clip", "advantages.clip"]),
        (["objective.std=batch", "objective.std_floor=1"], ["advantages.std", "advantages.std_floor"]),
        (["generator.family=flx"], ["generator.family", "'flx'", "flux", "package.module:object"]),
        (["generator.width=63"], ["generator.width 63", "even"]),
        (["reward.terms=[{name: redness, weight: 0}]"], ["reward.terms", "weight"]),
        (["reward.terms=[{name: redness}, {name: redness}]"], ["reward.terms", "redness"]),
        (["experiment.arms.vipo.seeds=[0,0]"], ["experiment.arms.vipo.seeds", "[0, 0]"]),
        (["experiment.name=../x"], ["experiment.name", "'../x'", "lower-case"]),
        # Impossible combinations.
        (["training.micro_batch=3"], ["training", "micro_batch 3", "8 samples", "may be 1, 2, 4, 8"]),
        (
            ["training.optimizer_steps_per_update=3"],
            ["training", "group_size 8", "optimizer_steps_per_update 3", "may be 1, 2, 4, 8"],
        ),
        (
            ["training.trained_transitions=10"],
            ["training.trained_transitions 10", "9 transitions", "sampling.steps 10"],
        ),
        (["objective.ratio=sample"], ["objective.ratio 'sample'", "credit.sources (backbone)", "ratio=position"]),
        (["credit.sources=[]"], ["objective.ratio 'position'", "needs one of credit.sources", "{name: backbone}"]),
        (
            ["objective.ratio_norm=guard", "objective.density=squared_error"],
            ["objective", "ratio_norm 'guard'", "density 'gaussian'"],
        ),
        (
            ["objective.ratio_norm=guard", "sampling.transition=ddim"],
            ["objective.ratio_norm 'guard'", "dance and flow"],
        ),
        (["sampling.transition=cps", "sampling.eta=1.5"], ["sampling", "eta 1.5 exceeds 1", "'cps'"]),
        (["sampling.transition=ddim", "sampling.eta=1.5"], ["sampling", "eta 1.5 exceeds 1", "'ddim'"]),
        (["sampling.window={size: 8, start: 2}"], ["sampling", "start 2 + size 8", "9 steps"]),
        (["sampling.window={size: 10, move: random}"], ["sampling", "start 0 + size 10", "9 steps"]),
        (["sampling.window={size: 3}"], ["training.trained_transitions 4", "3 transitions", "sampling.window"]),
        (["sampling.window={size: 4, move: slid}"], ["sampling.window.move", "'slide'", "'slid'"]),
        (["training.best_of=6"], ["training", "best_of 6", "multiple of 4"]),
        (["training.best_of=12"], ["training", "best_of 12", "at most group_size 8"]),
        (["training.best_of=4"], ["training", "micro_batch 8", "4 samples", "best_of", "may be 1, 2, 4"]),
        # Of an arm that is not the chosen one, too; in mappings, tuples, and sections that may be null.
        (["experiment.arms.product.typo=1"], ["experiment.arms.product.typo", "allowed: base, overrides, seeds"]),
        (
            ["sampling.window={size: 4, strid: 1}"],
            ["sampling.window.strid", "'stride'", "every, move, shared_start, size, solver"],
        ),
        # Numbers that no machine ends with, and no format holds.
        (["training.updates=1e400"], ["training.updates", "integer", "inf"]),
        (["sampling.eta=1e300"], ["sampling.eta", "less than or equal to 100"]),
        (["distribution.timeout_seconds=1e300"], ["distribution.timeout_seconds", "1e+300"]),
        (["perception.smoothing=1e9"], ["perception.smoothing", "less than or equal to 100"]),
        (["generator.device=cuda:99999999999"], ["generator.device", "'cuda:99999999999'"]),
        (["training.group_size=1000000000000"], ["training.group_size", "1000000000000"]),
        (["evaluation.steps=9223372036854775808"], ["evaluation.steps", "less than or equal to 1000"]),
        (["pretrain.steps=9223372036854775808"], ["pretrain.steps", "less than or equal to"]),
        (["pretrain.steps=100000000"], ["pretrain", "steps 100000000 * batch_size 48 is 4800000000 samples"]),
        (["training.prompts_per_update=16384"], ["training", "prompts_per_update 16384 * group_size 8", "65536"]),
        (["training.updates=1000000000"], ["training.updates * ", "160000000000 evaluations of the network"]),
        (
            ["evaluation.prompts=1000000"],
            ["evaluation: prompts 1000000 * samples_per_prompt 2 is 2000000 samples"],
        ),
        (["evaluation.prompts=400000", "evaluation.steps=1000"], ["evaluation.prompts * ", "for 4 sets of weights"]),
        (["generator.weights=bf16"], ["generator", "weights bf16 needs precision bf16"]),
        (["generator.weights=bf16", "generator.precision=bf16"], ["weights bf16 needs training.lora"]),
        (
            [
                "generator.weights=bf16",
                "generator.precision=bf16",
                "training.lora={}",
                "distribution={strategy: fsdp, processes: 2}",
            ],
            ["weights bf16 and distribution.strategy fsdp"],
        ),
        (["generator.frames=16384", "generator.height=1024"], ["generator", "1073741824 pixels"]),
        # Paths that no file can have.
        (['generator.path="a\0b"'], ["generator.path", "NUL character"]),
        (["perception.weights=" + "x" * 300], ["perception.weights", "longer than a path can be"]),
        # Names that become folders, and words of a scheduler's command line.
        (["experiment.arms.product.base=../x"], ["experiment.arms.product.base", "arm '../x' must be"]),
        (["experiment.name=" + "x" * 101], ["experiment.name", "at most 100"]),
        (["cluster.train.partition='a; b'"], ["cluster.train.partition", "'a; b'"]),
        (["evaluation.rewards=[redness,redness]"], ["evaluation.rewards", "named twice: redness, redness"]),
    ],
)
def test_bad_values_are_named(demo: Config, overrides: list[str], told: list[str]) -> None:
    data = OmegaConf.create(demo.model_dump(mode="json"))
    # As Hydra puts them over what it has composed, which takes a hundred times as long.
    for override in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(data, override.key_or_group, override.value(), merge=True, force_add=True)
    with pytest.raises(ConfigError) as caught:
        validate_config(OmegaConf.to_container(data))
    for words in told:
        assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["training.group_sizes=4"], ["training.group_sizes", "unknown key", "'group_size'"]),
        (["training=5"], ["training=5"]),
        (["arm=grpo", "objective.gate.scope=position"], ["objective", "gate.scope 'position'", "ratio 'position'"]),
        (["arm=grpo", "credit.multiplies=reward"], ["credit", "multiplies 'reward'", "needs one of sources"]),
        (["arm=grpo", "credit.control=inverted"], ["credit", "control 'inverted'", "needs one of sources"]),
        (["seed=" + "9" * 5000], ["4300 digits", "… of"]),
        (["experiment.title=" + "[" * 2000 + "]" * 2000], ["nested too deeply"]),
        (["arm=../x"], ["arm '../x' must be lower-case letters"]),
        # Unknown choices.
        (["arm=nope"], ["arm/nope", *ARMS]),
        (["generator=nope"], ["generator/nope", "demo", "flux_dev"]),
        (["prompts=file"], ["prompts.source", "missing"]),
    ],
)
def test_bad_overrides_are_named(overrides: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([DEMO, *overrides])
    for words in told:
        assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_saved_configuration_of_before_names_where_each_key_is_now(demo: Config, tmp_path: Path) -> None:
    data = demo.model_dump(mode="json")
    del data["credit"], data["advantages"]
    clip = {"side": "ppo", "scope": "sample", "range": 1e-4}
    old = {"map": "psm", "map_on": "advantage", "clip": clip, "advantage_clip": 5.0, "std": "group", "std_floor": 1e-4}
    kept = ("ratio", "channels", "density", "ratio_norm", "kl_weight")
    data["objective"] = {key: data["objective"][key] for key in kept} | old
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(data))
    with pytest.raises(ConfigError) as caught:
        load_config_file(path)
    assert str(caught.value).startswith(f"{path}: objective.map: is said elsewhere now, in credit.sources")
    assert {key for key in RENAMED if f"{key}: is said elsewhere now, in {RENAMED[key]}" in str(caught.value)} == {
        f"objective.{key}" for key in old
    }


def test_a_label_of_a_term_that_is_wrong_is_not_called_unknown() -> None:
    term = "reward.terms=[{name: clipscore, label: depicts, options: {tempalte: x}}]"
    with pytest.raises(ConfigError) as caught:
        load_config([DEMO, term, "evaluation.rewards=[depicts, redness]"])
    assert "did you mean 'template'?" in str(caught.value)
    assert "evaluation" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "a b\nc", "", "Upper", ".5", "x" * 101])
def test_an_arm_s_name_can_name_a_folder(demo: Config, name: str) -> None:
    data = demo.model_dump(mode="json")
    data["experiment"]["arms"][name] = {}
    with pytest.raises(ConfigError, match=r"^experiment\.arms: arm .* must be lower-case letters"):
        validate_config(data)


def test_every_number_has_both_bounds() -> None:
    """So that none starts what never ends, and none overflows where it is used."""
    unbounded = []

    def visit(node: Any, where: str) -> None:
        if isinstance(node, dict):
            if node.get("type") in ("integer", "number"):
                named = {key.lower() for key in node}
                if any(not named & {end, f"exclusive{end}"} for end in ("minimum", "maximum")):
                    unbounded.append(where)
            for key, value in node.items():
                visit(value, f"{where}.{key}")
        elif isinstance(node, list):
            for value in node:
                visit(value, where)

    visit(Config.model_json_schema(), "")
    assert unbounded == []


def test_trained_rewards_are_evaluated_without_being_named_again(demo: Config) -> None:
    """After those that are named, so that a list which holds them all is the one that is used."""
    named = ("object_redness", "redness", "scene_shape", "scene_background", "scene")
    assert tuple(reward.name for reward in demo.evaluation.rewards) == named
    terms = "reward.terms=[{name: redness}, {name: scene}]"
    more = load_config([DEMO, terms, "evaluation.rewards=[scene_shape, redness]"]).evaluation
    assert [reward.label for reward in more.rewards] == ["scene_shape", "redness", "scene"]
    assert [reward.label for reward in load_config([DEMO, "evaluation.rewards=[]"]).evaluation.rewards] == [
        "object_redness"
    ]


def test_unknown_and_absent_experiment_list_the_known_ones() -> None:
    for overrides, told in ((["experiment=nope"], "experiment/nope"), ([], "experiment")):
        with pytest.raises(ConfigError) as caught:
            load_config(overrides)
        assert told in str(caught.value)
        assert "demo" in str(caught.value)


def test_the_largest_possible_values_are_accepted() -> None:
    config = load_config([DEMO, "training.trained_transitions=9", "training.micro_batch=8", "training.save_at=[17]"])
    assert (config.training.trained_transitions, config.training.micro_batch, config.training.save_at) == (9, 8, (17,))


def test_a_shorter_run_keeps_the_updates_that_it_reaches() -> None:
    assert load_config([DEMO, "training.updates=12"]).training.save_at == (4, 8)
    assert load_config([DEMO, "training.updates=2"]).training.save_at == ()


def test_every_problem_is_one_line(demo: Config) -> None:
    data = _edited(demo, "seed", -1)
    data["training"]["group_size"] = 0
    with pytest.raises(ConfigError) as caught:
        validate_config(data)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["seed", "training.group_size"]


@pytest.mark.parametrize("arm", ARMS)
def test_resolved_yaml_round_trips(tmp_path: Path, arm: str) -> None:
    config = load_config([DEMO, f"arm={arm}", "optimizer.learning_rate=1e-5", "training.lora.rank=4"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config_file(path) == config
    assert dump_config(load_config_file(path)) == path.read_text()


ANY_TEXT = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=30),
    # What YAML, Hydra and Python read as something else than text.
    st.text("0123456789eE+-._:", max_size=8),
    st.text("${}\\a'\"#: \n\t\r\x85\u2028\ufeff-?,[]&*!|>%@`<=~", max_size=12),
    st.sampled_from(
        ["${seed} dollars", "${HOME}", "\\${seed}", "???", "null", "yes", "n", "1e5", "2020-01-01", "<<", "1:30.5"]
    ),
)


@settings(max_examples=60)
@given(texts=st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT), rate=st.floats(min_value=1e-12, max_value=1e3))
@example(texts=("'\\${seed} dollars'", "${HOME}", "${oc.env:HOME}"), rate=1e-5)
def test_any_text_and_rate_round_trip(
    demo: Config, tmp_path_factory: pytest.TempPathFactory, texts: tuple[str, str, str], rate: float
) -> None:
    data = demo.model_dump(mode="json")
    data["experiment"]["title"], data["prompts"]["text_key"], data["generator"]["negative_prompt"] = texts
    data["experiment"]["arms"]["vipo"]["overrides"] = list(texts)
    data["optimizer"]["learning_rate"] = rate
    config = validate_config(data)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config_file(path) == config
    assert (config.experiment.title, config.prompts.text_key) == texts[:2]
    # Every other reader of such files reads the same, the crate's parameters too.
    assert read_mapping(path) == config.model_dump(mode="json")


def test_what_a_caller_escapes_is_saved_and_read_as_it_is(tmp_path: Path) -> None:
    config = load_config([DEMO, r"experiment.title='\${seed} dollars'", r"experiment.question='\${HOME}'"])
    assert (config.experiment.title, config.experiment.question) == ("${seed} dollars", "${HOME}")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config_file(path) == config


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "no mapping"),
        ("seed: 1\n", "missing"),
        ("[" * 2000, "nested more than 50 levels deep"),
        ("".join(" " * depth + "a:\n" for depth in range(2000)), "nested more than 50 levels deep|larger|bytes"),
        ("a: &a [1]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in itertools.pairwise("abcdefgh")), "alias"),
        ("a: 1\na: 2\n", "names 'a' twice"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: b\n" * 2**16, "262144"),
        ("seed: 1e400\n", "seed: input should be a valid integer"),
        ("? [a]\n: 1\n", "not valid YAML"),
        ("a: !!bool maybe\n", r"holds no bool that can be read .*line 1, column 4"),
        ("a: !!timestamp soon\n", r"holds no timestamp that can be read"),
        ('"a\\nerror: \\e[2J": 1\n', r"a\\nerror: \\x1b\[2J: unknown key"),
    ],
)
def test_bad_resolved_files_are_named(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        load_config_file(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("experiment.title", "a\ud800"), ("generator.path", "\udcff"), ("evaluation.rewards", ["redness", "a\udfff"])],
)
def test_half_a_surrogate_is_refused_before_a_file_is_to_hold_it(demo: Config, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: .*half a surrogate"):
        _as(demo, key, value)


def test_saved_text_moves_no_terminal_and_reads_back(demo: Config, tmp_path: Path) -> None:
    title = "a\x1b[2J\u202eb\x9bc\u2028 \\x1b 'd'\n\t\x7f"
    config = demo.model_copy(update={"experiment": demo.experiment.model_copy(update={"title": title})})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert visible(dump_config(config)) == dump_config(config)
    assert load_config_file(path) == config


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError, match=f"cannot be read .*it is {kind}, a regular file is needed"):
            load_config_file(path)
    with pytest.raises(ConfigError, match="NUL character"):
        load_config_file(tmp_path / "a\0b")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `configs/` in the working directory."""
    shutil.copytree(repository_root() / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: &a [1]\nb: *a\n", r"mine\.yaml: is not valid YAML: holds an alias"),
        ("a: [1\n", "is not valid YAML"),
        ("".join(" " * depth + "a:\n" for depth in range(600)), "nested too deeply"),
        ("# &\na: " + "b" * 2**18, r"mine\.yaml: cannot be read .* 262144"),
        ("a: !!bool maybe\n", r"mine\.yaml: is not valid YAML: holds no bool"),
        (None, r"mine\.yaml: cannot be read .*a pipe"),
    ],
)
def test_configuration_files_that_would_not_end_or_crash(project: Path, content: str | None, told: str) -> None:
    path = project / "experiment" / "mine.yaml"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        load_config(["experiment=mine"])


def test_an_experiment_without_its_first_line_is_told_so(project: Path) -> None:
    text = (project / "experiment" / "demo.yaml").read_text()
    (project / "experiment" / "mine.yaml").write_text(text.replace("# @package _global_\n", ""))
    with pytest.raises(ConfigError, match=r"experiment/mine\.yaml: .* first line must be '# @package _global_'"):
        load_config(["experiment=mine"])


def test_another_hydra_project_is_not_taken_for_this_one(project: Path) -> None:
    assert repository_root() == project.parent
    (project / "arm" / "base.yaml").unlink()
    assert repository_root() != project.parent
    assert load_config([DEMO]).experiment.name == "demo"


def test_a_project_whose_files_lack_what_every_run_has(project: Path) -> None:
    (project / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match=r"experiment: missing"):
        load_config([])


@pytest.mark.parametrize("arm", ARMS)
def test_json_schema_accepts_the_resolved_config_and_refuses_what_pydantic_refuses(arm: str) -> None:
    schema = Config.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    config = load_config([DEMO, f"arm={arm}", "training.lora.rank=4"])
    jsonschema.validate(config.model_dump(mode="json"), schema)
    for key, value in (("training.group_size", 1), ("seed", "0"), ("credit.control", "upside"), ("reward.terms", [])):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(_edited(config, key, value), schema)
        with pytest.raises(ConfigError):
            validate_config(_edited(config, key, value))


def test_resolved_yaml_does_not_depend_on_the_locale(demo: Config, tmp_path: Path) -> None:
    """What is written where the locale's encoding is ASCII, twice."""
    path = tmp_path / "config.yaml"
    code = (
        "import sys; from pathlib import Path; from vipo.config.compose import *\n"
        "config = load_config(['experiment=demo', 'arm=vipo', \"experiment.title='\\u00e9\\u2014'\"])\n"
        "print(*(write_if_changed(Path(sys.argv[1]), dump_config(config)) for _ in range(2)))"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env={**os.environ, **plain}, check=True, capture_output=True, text=True)
    assert done.stdout == "True False\n"
    assert load_config_file(path).experiment.title == "é—"


@pytest.mark.parametrize("section", ["generator", "perception"])
@pytest.mark.parametrize("revision", ["main", "v1.0", "0123abc", "0" * 41, "A" * 40])
def test_a_revision_is_a_whole_commit_hash(demo: Config, section: str, revision: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.revision.*model_info\('OWNER/NAME'\)\.sha"):
        _as(demo, f"{section}.revision", revision)
    assert getattr(_as(demo, f"{section}.revision", "0a" * 20), section).revision == "0a" * 20


def test_config_is_frozen(demo: Config) -> None:
    with pytest.raises(ValueError, match="frozen"):
        demo.seed = 3  # type: ignore[misc]


def test_training_identity_follows_what_decides_the_result_and_nothing_else(demo: Config) -> None:
    base = config_hash(demo.training_identity())
    changes: dict[str, Any] = {
        "optimizer.learning_rate": 1e-6,
        "seed": 5,
        "training.threads": 2,
        "prompts.eval_share": 0.5,
        "prompts.ignore_case": True,
    }
    for key, value in changes.items():
        assert config_hash(_as(demo, key, value).training_identity()) != base, key
    irrelevant: dict[str, Any] = {
        "training.checkpoint_every": 1,
        "training.keep_checkpoints": 9,
        "evaluation.prompts": 3,
        "experiment.title": "other",
        "distribution.nodes": 2,
        "cluster.account": "chem",
        "cluster.train.partition": "gpu",
    }
    for key, value in irrelevant.items():
        assert config_hash(_as(demo, key, value).training_identity()) == base, key


def test_other_weights_are_other_samples_but_of_the_base(demo: Config) -> None:
    kept = _as(demo, "training.ema_decay", 0.9)
    mean = _as(kept, "evaluation.weights", "ema")
    assert "weights" not in kept.sampling_identity()["evaluation"]
    assert mean.sampling_identity() != kept.sampling_identity()
    # The base has no other weights: it is drawn once for both.
    assert mean.as_base().sampling_identity() == kept.as_base().sampling_identity()


def test_config_hash_ignores_order_and_refuses_nan() -> None:
    assert config_hash({"a": 1, "b": [2.5]}) == config_hash(json.loads('{"b": [2.5], "a": 1}'))
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    with pytest.raises(ValueError, match="JSON compliant"):
        config_hash(float("nan"))


def test_unchanged_text_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.yaml"
    assert write_if_changed(path, "a\n")
    assert path.read_text() == "a\n"
    stamp = path.stat().st_mtime_ns
    assert not write_if_changed(path, "a\n")
    assert path.stat().st_mtime_ns == stamp
    assert write_if_changed(path, "b\n")
    assert path.read_text() == "b\n"


@pytest.mark.parametrize("module", ["vipo.config.compose", "vipo.prompts"])
def test_light_rooms_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(sum(name in sys.modules for name in ('torch', 'diffusers', 'timm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _runs(*overrides: str) -> dict[str, Config]:
    arms = load_config([DEMO, *overrides]).experiment.arms
    configs = (load_config([DEMO, *overrides, f"arm={arm}"]) for arm in arms)
    return {config.run_name: config for config in configs}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["prompts.eval_share=0"], r"prompts\.eval_share: 0 holds no prompt out"),
        (
            ["experiment.arms.grpo.overrides=['evaluation.steps=5']"],
            r"run grpo-s0: its arm's overrides change section evaluation",
        ),
        (
            ["experiment.arms.grpo.overrides=['reward.terms=[{name: redness}]']"],
            r"run grpo-s0: its arm's overrides change section reward",
        ),
        (
            [f"~experiment.arms.{arm}" for arm in ARMS if arm != "base"],
            r"experiment\.arms: there is no arm but 'base'",
        ),
        (
            ["distribution.processes=3"],
            r"run grpo-s0: training\.group_size: the 1 micro-batches .* 3 processes.*processes in all may be 1$",
        ),
        (
            ["distribution.processes=4"],
            r"4 processes; change .*: training\.micro_batch may be 1, 2$",
        ),
        (["generator.height=128"], r"run base-s0: evaluation\.rewards: reward 'scene_shape' reads .* are 128x64"),
        (
            ["generator.frames=5", "evaluation.rewards=[redness]"],
            r"run base-s0: reward\.terms: reward 'object_redness' takes pictures",
        ),
    ],
)
def test_what_would_be_found_after_training_is_found_before(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_runs(_runs(*overrides))


def test_an_experiment_that_works_passes() -> None:
    runs = _runs()
    check_runs(runs)
    check_runs(_runs("distribution.processes=2", "training.micro_batch=4"))
    video = ["generator.frames=5", "reward.terms=[{name: redness}]", "evaluation.rewards=[redness]"]
    check_run(load_config([DEMO, *video]))
    with pytest.raises(ConfigError, match=r"credit\.sources: 'oracle' needs drawn pictures"):
        check_run(load_config([DEMO, *video, "arm=oracle"]))


def test_the_workflow_s_arms_lie_beside_each_other(tmp_path: Path) -> None:
    runs = _runs()
    for name, config in runs.items():
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
    (tmp_path / "grpo-s7.yaml").write_text("of another time")
    found = arms_beside(tmp_path / "base-s0.yaml", runs["base-s0"])
    assert {config.run_name: config for config in found} == runs
    assert arms_beside(tmp_path / "elsewhere" / "base-s0.yaml", runs["base-s0"]) == [runs["base-s0"]]


def test_home_is_expanded_in_every_configured_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ["generator.path", "prompts.source", "perception.weights"]
    config = load_config([DEMO, *(f"{key}=~/a b/{key}" for key in keys)])
    assert load_config([DEMO, *(f"{key}='~/a b/{key}'" for key in keys)]) == config
    assert [config.generator.path, config.prompts.source, config.perception.weights] == [
        f"{tmp_path}/a b/{key}" for key in keys
    ]
    # What is saved means the same to another user.
    monkeypatch.setenv("HOME", "/elsewhere")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config_file(path) == config
    assert load_config([DEMO, "generator.path='a~b/~'"]).generator.path == "a~b/~"
    for key in keys:
        with pytest.raises(ConfigError, match=rf"{key}: '~nobody_of_that_name/x': there is no user 'nobody_of"):
            load_config([DEMO, f"{key}='~nobody_of_that_name/x'"])


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("~", "/home/me"),
        ("~/x y", "/home/me/x y"),
        ("--results=~/x", "/home/me/x"),
        ("-o~/x", "/home/me/x"),
        ("~experiment.arms.product", None),
        ("~perception.weights=~/x", None),
        ("generator.path=~/x", None),
        ("s3://bucket/~/x", None),
        ("--sign=id_~/x", None),
    ],
)
def test_home_is_expanded_in_arguments_and_hydras_deletions_are_not(
    monkeypatch: pytest.MonkeyPatch, given: str, taken: str | None
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    expected = given if taken is None else given[: given.index("~")] + taken
    assert _expanded(given) == expected
