"""An evaluation at another size than training's: its samples, its shift, and what it leaves as it is."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import generator_config
from picture_checkpoints import write_flux, write_stable_diffusion_3
from PIL import Image
from tiny import OTHER_FAMILY
from torch import nn

from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.generators import load_generator
from vipo.generators.base import GeneratorError
from vipo.generators.configured import held_to_sample
from vipo.generators.pipeline import PipelineGenerator
from vipo.stages import encode_stage, prepare_stage, sample_stage, score_stage
from vipo.training.distribution import Distribution
from vipo.training.errors import TrainingError
from vipo.training.fit import require_fit
from vipo.training.plan import plan
from vipo.training.recorded import train_run
from vipo.training.setup import load_chain

ROOT = repository_root()
SIZE = ("height=32", "width=48")
PLAIN = (
    "reward=redness",
    "evaluation.rewards=[redness]",
    "perception.input_size=64",
    "evaluation.samples_per_prompt=1",
)


def _config(overrides: list[str], *more: str) -> Config:
    return load_config([*overrides, *PLAIN, *more])


def test_base_samples_are_those_of_a_generator_of_that_size(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    own = _config(tiny_overrides, "arm=base", *(f"evaluation.{value}" for value in SIZE), "evaluation.shift=5")
    trained = _config(tiny_overrides, "arm=base", *(f"generator.{value}" for value in SIZE), "sampling.shift=5")
    assert own.sampling_identity() == trained.sampling_identity()
    assert own.evaluation_identity() == trained.evaluation_identity()
    pictures = []
    for name, config in (("own", own), ("trained", trained)):
        results = Path(shutil.copytree(prepared, tmp_path / name))
        sample_stage(config, ROOT, results)
        folder = results / "demo" / "samples" / config.run_name
        facts = json.loads((folder / "samples.json").read_text())
        assert facts["grid"] == list(load_generator(trained.generator, ROOT).grid)
        files = sorted((folder / "pictures").iterdir())
        with Image.open(files[0]) as picture:
            assert picture.size == (48, 32)
        pictures.append([path.read_bytes() for path in files])
    assert len(pictures[0]) == 4
    assert pictures[0] == pictures[1]
    # Maps and scores are of the pictures as they are.
    score_stage(own, ROOT, tmp_path / "own")
    assert (tmp_path / "own" / "demo" / "evaluation" / own.run_name / "scores.parquet").is_file()


def test_no_training_depends_on_it(tiny_overrides: list[str]) -> None:
    plain = _config(tiny_overrides, "arm=vipo")
    for change in ("evaluation.height=32", "evaluation.shift=5", "evaluation.guidance_scale=2"):
        other = _config(tiny_overrides, "arm=vipo", change)
        assert other.training_identity() == plain.training_identity()
        assert other.embeddings_identity() == plain.embeddings_identity()
        assert other.sampling_identity() != plain.sampling_identity()
    # What says what is so anyway is the same evaluation.
    same = _config(tiny_overrides, "arm=vipo", f"evaluation.height={plain.generator.height}")
    assert same.evaluation_identity() == plain.evaluation_identity()
    assert "height" not in plain.evaluation_identity()["evaluation"]


def test_a_run_that_trains_without_guidance_is_compared_with_the_guided_base(tmp_path: Path) -> None:
    """Base and arm draw with the evaluation's; what the arm trains with is its own."""
    folder = write_stable_diffusion_3(tmp_path / "sd3")
    chosen = [*OTHER_FAMILY, "generator.family=sd3", f"generator.path={folder}", "evaluation.samples_per_prompt=1"]
    chosen += ["prompts.source=data/prompts/small.jsonl", "sampling.transition=dance", "generator.guidance_scale=1"]
    free = load_config([*chosen, "arm=grpo", "evaluation.guidance_scale=4"])
    base = load_config([*chosen, "arm=base", "generator.guidance_scale=4"])
    assert free.generator.guidance_scale == 1
    assert free.sampling_identity()["generator"] == base.sampling_identity()["generator"]
    results, drawn = tmp_path / "results", []
    prepare_stage(base, ROOT, results)
    encode_stage(base, ROOT, results)
    for number, more in enumerate((["generator.guidance_scale=4"], ["evaluation.guidance_scale=4"], [])):
        own = Path(shutil.copytree(results, tmp_path / str(number)))
        sample_stage(load_config([*chosen, "arm=base", *more]), ROOT, own)
        drawn.append([path.read_bytes() for path in sorted((own / "demo/samples/base-s0/pictures").iterdir())])
    assert drawn[0] == drawn[1] != drawn[2]


def test_under_autocast_weights_are_held_rounded_and_no_picture_changes(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the checkpoint, and of all weights after a training; in fp32 nothing is rounded."""
    chosen = [*tiny_overrides, *PLAIN, "generator.precision=bf16", "evaluation.prompts=2", "training.updates=1"]
    trained = tmp_path / "results"
    shutil.copytree(prepared, trained)
    base, arm = (load_config([*chosen, f"arm={name}", "training.save_at=[]"]) for name in ("base", "grpo"))
    train_run(arm, ROOT, trained / "demo")
    drawn: dict[str, list[bytes]] = {}
    for held in (held_to_sample, lambda config: config):
        own = Path(shutil.copytree(trained, tmp_path / str(len(drawn))))
        monkeypatch.setattr("vipo.evaluation.sample.held_to_sample", held)
        types: set[torch.dtype] = set()
        inner = PipelineGenerator.predict

        def noted(self: Any, *rest: Any, inner: Any = inner, types: set[torch.dtype] = types) -> Any:
            types |= {module.weight.dtype for module in self.network.modules() if isinstance(module, nn.Linear)}
            return inner(self, *rest)

        monkeypatch.setattr(PipelineGenerator, "predict", noted)
        for config in (base, arm):
            sample_stage(config, ROOT, own)
        monkeypatch.setattr(PipelineGenerator, "predict", inner)
        files = sorted((own / "demo/samples").glob("*/pictures/*.png"))
        drawn[str(types)] = [path.read_bytes() for path in files]
    (rounded, whole), names = drawn.values(), list(drawn)
    assert names == ["{torch.bfloat16}", "{torch.float32}"]
    assert len(rounded) == 4
    assert rounded == whole
    assert held_to_sample(load_config([*tiny_overrides, "arm=base"]).evaluated).weights == "fp32"


def test_what_it_cannot_make_is_refused_before_training(tiny_overrides: list[str]) -> None:
    for change, told in (
        ("evaluation.height=33", "evaluation.height.*33 must be even"),
        ("evaluation.frames=5", "evaluation.frames 5: the generator makes pictures"),
    ):
        with pytest.raises(ConfigError, match=told):
            _config(tiny_overrides, change)
    config = _config(tiny_overrides, "arm=vipo", "evaluation.height=34")
    generator, alone = load_generator(config.generator, ROOT), Distribution(config.distribution, "cpu")
    with pytest.raises(GeneratorError, match=r"section evaluation, .*: generator\.height 34 is not a mult"):
        load_chain(config, ROOT, generator, alone)


def test_another_shift_of_that_size_is_told(
    tiny_overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of FLUX.1-dev the stock scheduler shifts larger pictures more."""
    folder = write_flux(tmp_path / "flux")
    generator = load_generator(generator_config("flux", folder, height=32, width=32), ROOT)
    larger = load_generator(generator_config("flux", folder, height=64, width=64), ROOT).flow_shift
    assert isinstance(generator.flow_shift, float)
    assert isinstance(larger, float)
    assert larger > 1.02 * generator.flow_shift
    chosen = [
        f"generator.path={folder}",
        "generator.height=32",
        "generator.width=32",
        "generator.max_sequence_length=12",
    ]
    chosen += [f"sampling.shift={generator.flow_shift}", "evaluation.height=64", "evaluation.width=64"]
    alone = Distribution(load_config(tiny_overrides).distribution, "cpu")

    def told(*more: str) -> list[str]:
        caplog.clear()
        config = _config(tiny_overrides, *chosen, *more)
        own = load_generator(config.generator, ROOT)
        with caplog.at_level(logging.WARNING):
            load_chain(config, ROOT, own, alone)
        return [record.getMessage() for record in caplog.records if "shift" in record.getMessage()]

    (remark,) = told()
    assert remark.startswith(f"evaluation.shift {generator.flow_shift:g} is not the checkpoint's")
    assert f"shifts by {larger:.4g} at this size" in remark
    assert told(f"evaluation.shift={larger}") == []


def test_a_plan_counts_it(tiny_overrides: list[str]) -> None:
    plain = plan(_config(tiny_overrides, "arm=vipo"), ROOT, 2)
    config = _config(tiny_overrides, "arm=vipo", "evaluation.height=128", "evaluation.width=128")
    found = plan(config, ROOT, 2)
    assert (plain.peak, plain.flops) == (found.peak, found.flops)
    assert found.evaluation > plain.evaluation > found.held["network"] + found.held["autoencoder"]
    assert "peak of an evaluation" in found.text(None)
    smaller = plan(_config(tiny_overrides, "arm=vipo", "evaluation.height=128", "evaluation.batch=1"), ROOT, 2)
    assert smaller.evaluation < found.evaluation
    require_fit(config, ROOT, 2, found, found.evaluation + found.peak)
    with pytest.raises(TrainingError, match=r"an evaluation at 3 x 128 x 128 needs .*lower evaluation\.batch 16"):
        require_fit(config, ROOT, 2, found, found.evaluation - 1)
