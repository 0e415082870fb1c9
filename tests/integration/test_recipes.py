"""Setups, hardware and recipes: each composes, is planned on a tiny checkpoint of its family, and is looked at."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from families import FAMILIES

from vipo.check import check_experiment
from vipo.cli import app
from vipo.config.compose import load_config, repository_root
from vipo.config.experiment import check_run
from vipo.config.published import PublishedConfig
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.errors import VipoError
from vipo.evaluation.totals import _VBENCH_BOUNDS, _VBENCH_QUALITY, _VBENCH_SEMANTIC
from vipo.prompts import prompt_id
from vipo.reporting.published import published_table, published_values
from vipo.training.fit import require_fit
from vipo.training.plan import plan

ROOT = repository_root()
HARDWARE = ("1x24gb", "1x24gb_offload", "1x80gb", "8x80gb", "8x80gb_lora")
SETUPS = {
    "flux_paper": "flux",
    "wan_paper": "wan",
    "sd35_medium": "sd3",
    "flux2_klein": "flux2_klein",
    "qwen_image": "qwen_image",
    "qwen_image_21": "qwen_image_21",
}
RECIPES = {
    "flux_hps": "flux",
    "wan_videoalign": "wan",
    "sd35_pickscore": "sd3",
    "sd35_ocr": "sd3",
    "sd35_flow_grpo": "sd3",
    "paper_flux": "flux",
    "paper_wan": "wan",
}
TINY: Mapping[str, Mapping[str, int]] = {
    "flux": {},
    "wan": {"frames": 9},
    "sd3": {},
    "flux2_klein": {"max_sequence_length": 60},
    "qwen_image": {"width": 48},
    "qwen_image_21": {"max_sequence_length": 80},
}
"""Families, and the sizes that their tiny checkpoints take."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    return {name: FAMILIES[name].write(folder / name) for name in TINY}


def _tiny(family: str, checkpoints: dict[str, Path]) -> list[str]:
    """Overrides: a tiny checkpoint of a family, and pictures that this one takes."""
    small = {"path": str(checkpoints[family]), "height": 32, "width": 32, "max_sequence_length": 16, **TINY[family]}
    return ["prompts.source=prompts.txt", *(f"generator.{key}={value}" for key, value in small.items())]


@pytest.mark.parametrize("setup", SETUPS)
def test_hardware_leaves_the_update_as_it_is(setup: str) -> None:
    """How many samples an update has, and in how many steps, is no matter of how many GPUs there are."""
    given = ["experiment=ablation", f"setup={setup}", "prompts.source=p.txt"]
    configs = {name: load_config([*given, f"hardware={name}"]) for name in HARDWARE}
    held = {"lora", "micro_batch", "checkpoint_every"}
    updates = {config.training.model_dump_json(exclude=held) for config in configs.values()}
    assert len(updates) == 1
    for name, config in configs.items():
        lora = name not in ("8x80gb", "1x24gb_offload")
        assert (config.training.lora is not None, config.generator.weights == "bf16") == (lora, lora)
        assert config.distribution.world_size == int(name[0])
        assert config.generator.precision == "bf16"
        assert config.training.gradient_checkpointing
        check_run(config)


# Bytes of fp32 weights: parameters as published.
@pytest.mark.parametrize(("name", "whole"), [("flux_paper", 47.6e9), ("qwen_image", 81.7e9)])
def test_a_job_has_the_memory_that_reading_a_network_takes(name: str, whole: float) -> None:
    """By each of its processes, in fp32 at first; not where the network is no hardware's."""
    for hardware in ("1x80gb", "8x80gb", "8x80gb_lora"):
        cluster = load_config(
            ["experiment=ablation", f"setup={name}", "prompts.source=p.txt", f"hardware={hardware}"]
        ).cluster
        for asked in (cluster.train, cluster.evaluate):
            assert asked.memory_mb * 2**20 > whole * int(hardware[0]), hardware


def test_one_gpu_is_told_to_stop_in_time_and_writes_checkpoints_often() -> None:
    """An update of Wan's is five minutes there; whatever the experiment says for its own eight GPUs."""
    for hardware in HARDWARE:
        config = load_config(["experiment=wan_videoalign", "prompts.source=p.txt", f"hardware={hardware}"])
        few = hardware.startswith("1x")
        assert (config.cluster.stop_seconds, config.training.checkpoint_every) == ((1200, 5) if few else (300, 25))


# Recipes are planned on their own hardware, 8x80gb, below.
@pytest.mark.parametrize(("setup", "hardware"), [("flux_paper", "8x80gb"), *((setup, "1x24gb") for setup in SETUPS)])
def test_a_setup_is_planned_on_its_hardware(setup: str, hardware: str, checkpoints: dict[str, Path]) -> None:
    """Accepted with what it needs; with less, the paper's is refused and told what would fit."""
    reward = ["reward=flicker"] if setup == "wan_paper" else ["reward=redness"]
    given = ["experiment=ablation", f"setup={setup}", f"hardware={hardware}", *reward, "evaluation.rewards=[]"]
    config = load_config([*given, *_tiny(SETUPS[setup], checkpoints)])
    found = plan(config, ROOT, prompts=8)
    require_fit(config, ROOT, 8, found, found.peak)
    # What would fit is planned once more for each saving, which one setup tells as well as five.
    if setup == "flux_paper":
        told = "it would fit, and be slower" if hardware == "1x24gb" else "it would fit with training.micro_batch=1"
        with pytest.raises(VipoError, match=told):
            require_fit(config, ROOT, 8, found, found.peak - 1)


@pytest.mark.parametrize("name", [*RECIPES, *SETUPS])
def test_recipes_and_setups_are_looked_at(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\nan owl\n" * 20)
    whole = [f"experiment={name}"] if name in RECIPES else ["experiment=ablation", f"setup={name}"]
    given = [*whole, *_tiny((RECIPES | SETUPS)[name], checkpoints), f"prompts.source={prompts}"]
    arms = ("vipo",)
    if name in RECIPES:
        arms = ("base", "flow_grpo" if name == "sd35_flow_grpo" else "grpo", "vipo")
    runs = {arm: load_config([*given, f"arm={arm}"]) for arm in arms}
    lines = {line.subject: line for line in check_experiment(runs, ROOT, tmp_path)}
    assert lines["configuration"].verdict == "ok", lines["configuration"]
    assert not [line for line in lines.values() if "could not be checked" in line.said]
    assert lines["GPUs"].said.startswith("8 wanted")
    assert "memory" in lines


@pytest.mark.parametrize(
    ("recipe", "setup"),
    [("flux_hps", "flux_paper"), ("wan_videoalign", "wan_paper"), ("sd35_pickscore", "sd35_medium")],
)
def test_a_recipe_says_again_what_its_setup_says(recipe: str, setup: str) -> None:
    """A recipe is whole in its own file."""
    one = load_config([f"experiment={recipe}", "prompts.source=p.txt"])
    other = load_config(["experiment=ablation", f"setup={setup}", "prompts.source=p.txt"])
    kept = {"training": {"save_at"}}
    for section in ("generator", "sampling", "objective", "advantages", "optimizer", "training", "perception"):
        left, right = (getattr(config, section).model_dump(exclude=kept.get(section)) for config in (one, other))
        assert left == right, section


def test_published_numbers_are_as_they_were_printed() -> None:
    values = {"a": [1e-5, 2345678, 0.0], "b": [0.02, 1.5, None]}
    columns = [{"title": name, "metric": f"reward/{name}", "domain": "in"} for name in "xyz"]
    rows = {arm: {"title": arm, "values": row} for arm, row in values.items()}
    table = PublishedConfig.model_validate({"source": "A paper", "columns": columns, "rows": rows})
    assert published_values(table) == {
        "a": ["0.00001", "2345678.0", "0"],
        "b": ["0.02000", "1.5", "not published"],
    }


def test_the_published_tables_are_on_their_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/paper.md").read_text()
    for name in ("paper_flux", "paper_wan"):
        app(
            ["published", f"experiment={name}", "prompts.source=p.txt", "--results", "no/results"],
            standalone_mode=False,
        )
        assert capsys.readouterr().out in page, name
    with pytest.raises(ConfigError, match="has no published table"):
        published_table(load_config(["experiment=demo"]), Path())


def test_a_cell_is_filled_by_what_was_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = "experiment.arms={base: {seeds: [0]}, grpo: {seeds: [0, 1]}, vipo: {seeds: [0]}}"
    table = (
        "experiment.published={source: 'A | b', columns: [{title: R, metric: reward/redness, domain: in}, "
        "{title: V, metric: vbench/total, domain: out}], rows: {base: {title: base, values: [1.5, null]}, "
        "grpo: {title: G, values: [2, 3]}, vipo: {title: V, values: [2, 3]}}}"
    )
    config = load_config(["experiment=demo", arms, table])

    class Records:
        stale = None

        def __init__(self, path: Path) -> None:
            self.config = config
            self.stale = "old" if path.name == "vipo-s0" else None

    monkeypatch.setattr("vipo.reporting.published.read_run", Records)
    monkeypatch.setattr("vipo.reporting.published.read_scores", lambda file, _: pd.read_parquet(file))
    for run, values in (("base-s0", [0.1, 0.3, 9]), ("grpo-s1", [0.5, 0.7, 9]), ("vipo-s0", [1, 1, 9])):
        folder = tmp_path / "demo/evaluation" / run
        folder.mkdir(parents=True)
        scores = {"prompt_id": ["a", "b", "a"], "reward/redness": values, "final": [True, True, False]}
        scores |= {"seed": [0] * 3, "sample": [0] * 3, "update": [1, 1, 0]}
        pd.DataFrame(scores).to_parquet(folder / "scores.parquet")
    rows = published_table(config, tmp_path).splitlines()
    # Of a sample that one has no score of, no other's counts.
    path = tmp_path / "demo/evaluation/grpo-s1/scores.parquet"
    whole = pd.read_parquet(path)
    more = pd.DataFrame({"prompt_id": ["c"], "final": [True], "seed": [0], "sample": [0], "update": [1]})
    for run, value in (("base-s0", 0.9), ("grpo-s1", None)):
        own = pd.read_parquet(tmp_path / f"demo/evaluation/{run}/scores.parquet")
        own = pd.concat([own, more.assign(**{"reward/redness": [value]}).astype({"reward/redness": float})])
        own.to_parquet(tmp_path / f"demo/evaluation/{run}/scores.parquet")
    without = published_table(config, tmp_path).splitlines()
    assert without[4].startswith("| base (`base`) | 1.5 | 0.2000 (samples left out: 1) |")
    assert without[5].startswith("| G (`grpo`) | 2.0 | 0.6000 (1 of 2 seeds) (samples left out: 1) |")
    whole.to_parquet(path)
    _check_vbench(tmp_path / "demo/evaluation/base-s0/scores.parquet", config, tmp_path)
    assert rows[0] == "Published: A \\| b."
    assert rows[4:] == [
        "| base (`base`) | 1.5 | 0.2000 | not published | not measured |",
        "| G (`grpo`) | 2.0 | 0.6000 (1 of 2 seeds) | 3 | not measured |",
        "| V (`vipo`) | 2.0 | not run | 3 | not run |",
    ]


def _check_vbench(file: Path, config: Config, results: Path) -> None:
    """With quality at the upper end of every scale and meaning at the lower, 100, 0 and 80; one missing, none."""
    scores = pd.read_parquet(file)
    ends = {
        f"reward/vbench_{name}": _VBENCH_BOUNDS.get(name, (0.0, 1.0))[end]
        for end, names in ((1, _VBENCH_QUALITY), (0, _VBENCH_SEMANTIC))
        for name in names
    }
    folder = results / "demo/prompts"
    folder.mkdir()

    def hold_out(metadata: dict[str, Any]) -> None:
        rows = [{"id": prompt_id(text), "text": text, "metadata": metadata} for text in ("a", "b")]
        (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    scores["prompt_id"] = [prompt_id(text) for text in scores["prompt_id"]]
    scores.assign(**ends).to_parquet(file)
    # The same columns on prompts that are not VBench's are nothing to stand beside its numbers.
    hold_out({})
    assert "| not published | not measured |" in published_table(config, results)
    hold_out({"dimension": [*_VBENCH_QUALITY, *_VBENCH_SEMANTIC]})
    assert "| not published | 80.0000 |" in published_table(config, results)
    scores.assign(**ends).drop(columns=list(ends)[3]).to_parquet(file)
    assert "| not published | not measured |" in published_table(config, results)


def test_the_paper_s_vbench_headings_are_exchanged() -> None:
    table = load_config(["experiment=paper_wan", "prompts.source=p.txt"]).experiment.published
    assert table is not None
    places = {column.metric: place for place, column in enumerate(table.columns)}
    for row in table.rows.values():
        quality, semantic, total = (row.values[places[f"vbench/{name}"]] for name in ("quality", "semantic", "total"))
        assert (4 * quality + semantic) / 5 == pytest.approx(total, abs=0.015)


def _documented() -> list[str]:
    pages = [
        ROOT / "docs/hardware.md",
        ROOT / "docs/paper.md",
        *(ROOT / f"configs/experiment/{name}.yaml" for name in RECIPES),
    ]
    found = [re.findall(r"^(?:#   )?vipo (.*)$", page.read_text(), re.MULTILINE) for page in pages]
    return sorted({line for lines in found for line in lines})


@pytest.mark.parametrize("command", _documented())
def test_documented_commands_parse_and_compose(command: str) -> None:
    group = typer.main.get_command(app)
    words = shlex.split(command, comments=True)
    with group.make_context("vipo", words) as context:
        name, subcommand, rest = group.resolve_command(context, words)
    with subcommand.make_context(name, rest) as parsed:
        load_config(list(parsed.params["overrides"]))
