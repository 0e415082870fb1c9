"""What lies in a results folder is used for what it is: damaged checkpoints, weights without numbers, finished runs."""

import hashlib
import json
import logging
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.config.compose import load_config, load_config_file, repository_root
from vipo.config.run import Config
from vipo.generators import GeneratorError
from vipo.stages import encode_stage, evaluate_stage, prepare_stage, train_stage
from vipo.training import recorded
from vipo.training import run as run_module
from vipo.training.checkpoints import list_checkpoints
from vipo.training.errors import TrainingError
from vipo.training.finished import finished_weights, next_command
from vipo.training.setup import Setup, set_up
from vipo.training.state import resume, run_identity
from vipo.training.update import update

ROOT = repository_root()
RUN = "demo/runs/vipo-s0"
WEIGHTS = f"{RUN}/weights/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def config(tiny_generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a copy of the generator: a test spoils it for a moment."""
    generator = shutil.copytree(tiny_generator, tmp_path_factory.mktemp("copied") / "generator")
    settings = ["steps=4"]
    training = ("updates=4", "prompts_per_update=2", "group_size=4", "micro_batch=4", "trained_transitions=2")
    training += ("checkpoint_every=1", "keep_checkpoints=4", "save_at=[2]")
    evaluation = ("prompts=4", "steps=4")
    return load_config(
        [
            "experiment=demo",
            "arm=vipo",
            f"generator.path={generator}",
            *(f"sampling.{item}" for item in settings),
            *(f"training.{item}" for item in training),
            *(f"evaluation.{item}" for item in evaluation),
        ]
    )


@pytest.fixture(scope="module")
def prepared(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with prompts and embeddings of the copy."""
    results = tmp_path_factory.mktemp("prepared")
    prepare_stage(config, ROOT, results)
    encode_stage(config, ROOT, results)
    return results


@pytest.fixture(scope="module")
def trained(prepared: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with one finished run."""
    results = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("trained") / "results"))
    train_stage(config, ROOT, results)
    return results


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "results"))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _resealed(folder: Path) -> None:
    """A manifest that fits whatever the files hold now."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "manifest.json").write_text(json.dumps(hashes))


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        changed = change(state)
        (folder / "state.json").write_text(json.dumps(state if changed is None else changed))

    return damage


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "tensors.safetensors")
        change(tensors)
        save_file(tensors, folder / "tensors.safetensors")

    return damage


def _network(tensors: Mapping[str, Tensor]) -> str:
    return max(name for name in tensors if name.startswith("network/") and tensors[name].ndim == 2)


def _pickle(folder: Path) -> None:
    torch.save({"w": torch.zeros(2)}, folder / "tensors.safetensors")


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors[_network(tensors)][0, 0] = math.nan


DAMAGES: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "a state that is a list": (_state(lambda state: []), "no JSON object"),
    "a state nested too deep": (lambda folder: (folder / "state.json").write_text("[" * 100_000), "Recursion"),
    "a state that is empty": (_state(lambda state: {}), "'identity' is NoneType"),
    "metrics that are a number": (_state(lambda state: state.update(metrics=3)), "'metrics' is int"),
    "metrics that are no JSON": (_state(lambda state: state.update(metrics="x\n")), "metrics or code"),
    "metrics of other updates": (
        _state(lambda state: state.update(metrics='{"update": 1}\n')), "not those of updates 1 to 4",
    ),
    "code that is a number": (_state(lambda state: state.update(code=[3])), "metrics or code"),
    "a configuration that is none": (_state(lambda state: state.update(config=None)), "'config' is NoneType"),
    "a pickle": (_pickle, "SafetensorError"),
    "a network's tensor missing": (_tensors(lambda t: t.pop(_network(t))), "is missing"),
    "a network's tensor too many": (_tensors(lambda t: t.update({"network/x": torch.ones(1)})), "does not belong"),
    "a network's tensor of another shape": (
        _tensors(lambda t: t.update({_network(t): t[_network(t)][:-1].clone()})), "F32 (",
    ),
    "a network's tensor of another type": (
        _tensors(lambda t: t.update({_network(t): t[_network(t)].half()})), "F16 (",
    ),
    "a network's tensor not finite": (_tensors(_nan), "is not finite"),
    "an optimizer's tensor missing": (_tensors(lambda t: t.pop("optimizer/0.exp_avg")), "were written"),
    "an optimizer's tensor of another shape": (
        _tensors(lambda t: t.update({"optimizer/0.exp_avg": torch.zeros(1)})), "0.exp_avg",
    ),
    "an optimizer of other parameters": (
        _tensors(lambda t: t.update({"optimizer/99999.step": t.pop("optimizer/0.step")})), "no parameter '99999'",
    ),
    "an optimizer's steps not finite": (
        _tensors(lambda t: t.update({"optimizer/0.step": torch.tensor(math.inf)})), "is not finite",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def setup(trained: Path, config: Config) -> Setup:
    """Loaded once; the tests let it look into other folders."""
    return set_up(config, ROOT, trained / "demo")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_of_damaged_content_is_named_and_the_one_before_is_used(
    results: Path, setup: Setup, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    setup = replace(setup, experiment=results / "demo")
    change, told = DAMAGES[damage]
    (newest, before, *_) = list_checkpoints(results / RUN / "checkpoints")
    change(newest)
    _resealed(newest)
    found = resume(setup, run_identity(setup))
    assert found is not None
    assert found.update == int(before.name) == 3
    assert told in caplog.text
    assert f"checkpoint {int(newest.name)}" in caplog.text or newest.name in caplog.text
    assert "damaged" in caplog.text
    assert "the checkpoint before it is used" in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_with_the_same_bytes(results: Path, config: Config) -> None:
    names = [f"{RUN}/metrics.jsonl", WEIGHTS]
    whole = [(results / name).read_bytes() for name in names]
    _tensors(_nan)(list_checkpoints(results / RUN / "checkpoints")[0])
    _resealed(list_checkpoints(results / RUN / "checkpoints")[0])
    (results / RUN / "provenance.json").unlink()
    (results / WEIGHTS).unlink()
    train_stage(config, ROOT, results)
    assert [(results / name).read_bytes() for name in names] == whole


def test_weights_that_are_not_finite_are_not_kept(
    prepared: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Path(shutil.copytree(prepared, tmp_path / "results"))

    def poisoned(setup: Setup, number: int, *others: Any) -> dict[str, float]:
        metrics = update(setup, number, *others)
        if number == 2:
            with torch.no_grad():
                next(iter(setup.trainable.values())).view(-1)[0] = math.inf
        return metrics

    monkeypatch.setattr(run_module, "update", poisoned)
    with pytest.raises(TrainingError, match=r"update 2: the weights are not finite after it, first '.*last good state"):
        train_stage(config, ROOT, results)
    assert [path.name for path in list_checkpoints(results / RUN / "checkpoints")] == ["000001"]
    assert list((results / RUN / "updates").iterdir()) == []


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("place", ["weights", "updates/000002"])
def test_trained_weights_without_numbers_are_named_before_anything_is_drawn(
    results: Path, config: Config, value: float, place: str
) -> None:
    path = results / WEIGHTS.replace("weights", place, 1)
    tensors = load_file(path)
    name = max(tensors)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    (results / RUN / "provenance.json").unlink()
    with pytest.raises(GeneratorError, match=rf"{place}/.*tensor '{name}' holds values that are not finite"):
        evaluate_stage(config, ROOT, results)
    assert not (results / "demo" / "evaluation" / "vipo-s0" / "scores.parquet").exists()


# ---- finished runs ---------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_loads_nothing(
    results: Path, config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    monkeypatch.setattr(recorded, "set_up", None)
    with caplog.at_level(logging.INFO):
        train_stage(config, ROOT, results)
    assert f"vipo-s0: is finished, nothing is left to do; its weights are in {results / RUN / 'weights'}" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before
    command = shlex.split(next_command(config, results))
    assert f"next: {shlex.join(command)}" in caplog.text
    assert command[:3] == ["vipo", "evaluate", "--config"]
    assert load_config_file(Path(command[3])).run_name == "vipo-s0"
    assert command[4:] == ["--results", str(results)]


def test_training_says_what_it_loads_and_what_comes_next(
    prepared: Path, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = Path(shutil.copytree(prepared, tmp_path / "my results"))
    with caplog.at_level(logging.INFO, logger="vipo"):
        train_stage(config, ROOT, results)
    first, last = caplog.messages[0], caplog.messages[-2:]
    assert first.startswith(f"vipo-s0: loading generator {config.generator.path} (flux), rewards object_redness")
    assert first.endswith(f"backbone {config.perception.backbone}")
    assert last[0] == f"vipo-s0: its weights are in {results / RUN / 'weights'}"
    assert last[1] == f"next: {next_command(config, results)}"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(results: Path) -> None:
        path = results / RUN / "provenance.json"
        record = json.loads(path.read_text())
        changed = change(record)
        path.write_text(json.dumps(record if changed is None else changed))

    return edit


UNFINISHED: Mapping[str, Callable[[Path], object]] = {
    "no record": lambda results: (results / RUN / "provenance.json").unlink(),
    "a record that is none": lambda results: (results / RUN / "provenance.json").write_text("[]"),
    "a record of another configuration": _record(lambda record: record.update(config_sha256="0" * 64)),
    "a record without inputs": _record(lambda record: record.update(inputs=[])),
    "a record without outputs": _record(lambda record: record.update(outputs=[])),
    "a record of odd outputs": _record(lambda record: record.update(outputs=[3])),
    "a byte of the weights": lambda results: _flip(results / WEIGHTS),
    "a byte of the metrics": lambda results: _flip(results / RUN / "metrics.jsonl"),
    "a byte of the embeddings": lambda results: _flip(results / "demo/embeddings/train.safetensors"),
    "another prompt": lambda results: (results / "demo/prompts/train.jsonl").open("a").write("\n"),
    "weights lost": lambda results: shutil.rmtree(results / RUN / "weights"),
    "kept weights lost": lambda results: shutil.rmtree(results / RUN / "updates/000002"),
    "a file among the weights": lambda results: (results / RUN / "weights" / "more.json").write_text("{}"),
}


@pytest.mark.parametrize("change", UNFINISHED)
def test_what_changed_is_not_finished(results: Path, config: Config, change: str) -> None:
    """The results were copied: what counts is the copy, and not what the record's paths still lead to."""
    assert finished_weights(config, ROOT, results / "demo") == results / RUN / "weights"
    UNFINISHED[change](results)
    assert finished_weights(config, ROOT, results / "demo") is None


def test_another_configuration_or_generator_is_not_finished(
    results: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": 1.0})})
    assert finished_weights(other, ROOT, results / "demo") is None
    monkeypatch.setenv("RANK", "0")
    # A leftover of something else.
    assert finished_weights(config, ROOT, results / "demo") is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert finished_weights(config, ROOT, results / "demo") is None
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    generator = Path(config.generator.path)
    weights = generator / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    try:
        _flip(weights)
        assert finished_weights(config, ROOT, results / "demo") is None
    finally:
        weights.write_bytes(before)
    assert finished_weights(config, ROOT, results / "demo") is not None


def test_commands_that_compute_nothing_load_no_torch() -> None:
    """Each import of it costs seconds."""
    light = "vipo.cli, vipo.stages, vipo.audit, vipo.training.finished, vipo.reporting, vipo.training.errors"
    told = f"import sys, {light}; print(sorted({{'torch', 'diffusers', 'transformers', 'rocrate'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
