"""Trackers: the libraries' own readers find each row once, and whatever fails in one leaves the run as it was."""

import json
import logging
import os
import random
import re
import signal
import socket
import struct
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vipo.config.compose import load_config, repository_root
from vipo.config.registries import TRACKERS
from vipo.config.run import Config
from vipo.config.tracking import TrackingConfig
from vipo.config.validation import ConfigError
from vipo.errors import Preempted
from vipo.imports import check_imports
from vipo.tracking.rows import Rows, TrackingError
from vipo.tracking.tracker import Row, TrackedRun
from vipo.tracking.trackers import Trackers, check_tracker, sheet_path

ROOT = repository_root()
PAGE, README = (ROOT / "docs" / "tracking.md").read_text(), (ROOT / "README.md").read_text()
MODULE = f"{__name__}:"


def _config(*trackers: str) -> Config:
    return load_config(["experiment=demo", "arm=vipo", f"tracking.trackers={list(trackers)}"])


def _sheet(folder: Path, update: int) -> None:
    path = sheet_path(folder, update)
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8 * update, 4), (update, 0, 0)).save(path)


def _run(folder: Path, config: Config, done: int, until: int, value: float) -> None:
    """As a process of a run: from a checkpoint after `done` updates, killed or finished after `until`."""
    with Rows(folder, done) as rows, Trackers(config, folder, rows.history()) as trackers:
        for update in range(done + 1, until + 1):
            if update % 2 == 0:
                _sheet(folder, update)
            metrics, timing = {"reward/mean": value, "loss": float(update)}, {"time/total": 0.5}
            rows.log(update, metrics, timing)
            trackers.log(update, metrics | timing)


def _killed_and_resumed(folder: Path, name: str) -> None:
    """Six updates, the fourth and fifth made twice."""
    _run(folder, _config(name), 0, 5, -1.0)
    _run(folder, _config(name), 3, 6, 2.0)


EXPECTED = [(1, -1.0), (2, -1.0), (3, -1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(own: socket.socket, address: Any) -> None:
        if own.family != socket.AF_UNIX:
            raise AssertionError(f"connects to {address}")
        connect(own, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_tensorboard_shows_the_resumed_run_alone(tmp_path: Path) -> None:
    _killed_and_resumed(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward/mean")] == EXPECTED
    assert [event.step for event in board.Scalars("time/total")] == [1, 2, 3, 4, 5, 6]
    assert [(image.step, image.width, image.height) for image in board.Images("samples")] == [
        (2, 16, 4),
        (4, 32, 4),
        (6, 48, 4),
    ]


def test_tensorboard_that_was_chosen_later_shows_the_whole_run(tmp_path: Path) -> None:
    _run(tmp_path, _config(), 0, 3, 1.0)
    _run(tmp_path, _config("tensorboard"), 3, 4, 1.0)
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    assert not (tmp_path / "trackers").exists()


def test_mlflow_shows_the_resumed_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _killed_and_resumed(tmp_path, "mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "trackers" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("vipo-s0", "FINISHED")
    found = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(metric.step, metric.value) for metric in found] == EXPECTED
    assert run.data.params["training.group_size"] == "8"
    images = [Path(item.path).name for item in client.list_artifacts(run.info.run_id, "images")]
    steps = [re.search(r"step\W(\d+)", name) for name in images if name.endswith(".png")]
    assert sorted(step[1] for step in steps if step) == ["2", "4", "6"]


def test_wandb_shows_the_resumed_run_alone_and_keeps_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "trackers" / "wandb"
    _run(tmp_path, _config("wandb"), 0, 5, -1.0)
    (first,) = folder.glob("offline-run-*")
    _run(tmp_path, _config("wandb"), 3, 6, 2.0)
    (second,) = folder.glob("offline-run-*")
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    assert _history(second) == EXPECTED
    pictures = sorted((second / "files" / "media" / "images").iterdir())
    assert [path.name.split("_")[1] for path in pictures] == ["2", "4", "6"]


def _history(folder: Path) -> list[tuple[int, float]]:
    """What `wandb sync` would send: steps and values of the records in W&B's own log."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    rows = []
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append((record.history.step.num, json.loads(items["reward/mean"])))
    return rows


def _fails(folder: Path, name: str, error: BaseException) -> None:
    def train() -> None:
        with Rows(folder, 0) as rows, Trackers(_config(name), folder, rows.history()) as trackers:
            trackers.log(1, {"reward/mean": 1.0})
            raise error

    with pytest.raises(type(error)):
        train()


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError(), "FAILED"), (Preempted(), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_mlflow_shows_how_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str
) -> None:
    _fails(tmp_path, "mlflow", error)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "trackers" / "mlflow").as_uri())
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == status


def test_wandb_shows_that_a_run_failed(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    def exit_code(folder: Path) -> int:
        (path,) = (folder / "trackers" / "wandb").glob("offline-run-*/*.wandb")
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "exit":
                return int(record.exit.exit_code)
        raise AssertionError

    _run(tmp_path / "whole", _config("wandb"), 0, 1, 1.0)
    _fails(tmp_path / "failed", "wandb", RuntimeError())
    assert (exit_code(tmp_path / "whole"), exit_code(tmp_path / "failed")) == (0, 1)


def test_a_tracker_without_a_word_for_failures_is_closed_as_ever(notes: str, tmp_path: Path) -> None:
    _fails(tmp_path, notes, RuntimeError())
    assert (tmp_path / "trackers" / "my_trackers.Notes" / "notes.txt").read_text() == "1 1.000\n"


def _records(log: bytes) -> Iterator[bytes]:
    """LevelDB's log format after seven bytes of W&B's own: pieces behind CRC, length and kind, in blocks of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        # A whole one, or the last piece of one.
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_changes_nothing_of_the_process(tmp_path: Path, name: str) -> None:
    def process() -> tuple[Any, ...]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        return dict(os.environ), handlers, sys.excepthook, random.getstate(), sys.stdout, sys.stderr, Path.cwd()

    before = process()
    _run(tmp_path, _config(name), 0, 2, 1.0)
    assert process() == before
    made = [path for path in (tmp_path / "trackers" / name).rglob("*") if not path.is_dir()]
    assert made
    assert not [path for path in made if path.is_symlink()]


@pytest.fixture
def notes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """The import path of the page's example."""
    ((name, code),) = re.findall(r"Save this as `(\w+)\.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    folder = tmp_path_factory.mktemp("example")
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return f"{name}:Notes"


def test_the_pages_example_shows_the_resumed_run_alone(notes: str, tmp_path: Path) -> None:
    section = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])["tracking"]
    assert notes in TrackingConfig(**section).trackers
    check_imports(_config(notes))
    _killed_and_resumed(tmp_path, notes)
    text = (tmp_path / "trackers" / "my_trackers.Notes" / "notes.txt").read_text()
    assert text == "1 -1.000\n2 -1.000 000002.png\n3 -1.000\n4 2.000 000004.png\n5 2.000\n6 2.000 000006.png\n"


def test_the_pages_commands_are_the_viewers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.cli
    import wandb.cli.cli
    from tensorboard import default, program

    board = program.TensorBoard(plugins=default.get_plugins())
    (shown,) = set(re.findall(r"tensorboard --logdir \S*\w", PAGE + README))
    board.configure(argv=shown.split())
    assert board.flags.logdir == "results/demo/runs"
    monkeypatch.chdir(tmp_path)
    for group, pattern in ((wandb.cli.cli.cli, r"`wandb (sync \S+)`"), (mlflow.cli.cli, r" mlflow (ui \S+ \S+)`")):
        command, *arguments = re.findall(pattern, PAGE)[0].split()
        Path(arguments[-1]).mkdir(parents=True)
        found = group.get_command(None, command)
        assert found.make_context(command, arguments).params


def test_the_page_lists_every_tracker_that_ships() -> None:
    table = PAGE.split("## Trackers that ship")[1].split("\n- ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(TRACKERS)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for name in TRACKERS if f"vipo[{name}]" in table} <= extras.keys()


class Failing:
    def __init__(self, run: TrackedRun) -> None:
        pass

    def log(self, row: Row) -> None:
        random.seed(0)
        os.environ["CHANGED"] = "1"
        if row.update == 2:
            raise ConnectionError("the network is down")

    def close(self) -> None:
        raise AssertionError("it was left out before")


class Refusing:
    def __init__(self, run: TrackedRun) -> None:
        raise SystemExit(3)


def no_tracker(run: TrackedRun) -> Mapping[str, float]:
    return {}


def test_one_that_fails_is_told_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = random.getstate()
    with caplog.at_level(logging.WARNING):
        _run(tmp_path, _config(f"{MODULE}Failing", "tensorboard"), 0, 6, 1.0)
    assert random.getstate() == before
    assert "CHANGED" not in os.environ
    assert [record.getMessage() for record in caplog.records] == [
        f"tracker '{MODULE}Failing' raised ConnectionError: the network is down; the run goes on without it"
    ]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 6
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert len(board.Scalars("loss")) == 6


@pytest.mark.parametrize(
    ("name", "told"), [("Refusing", "raised SystemExit: 3"), ("no_tracker", "gives dict, which has no method 'log'")]
)
def test_one_that_cannot_be_made_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, told: str
) -> None:
    with caplog.at_level(logging.WARNING):
        _run(tmp_path, _config(f"{MODULE}{name}"), 0, 2, 1.0)
    (record,) = caplog.records
    assert told in record.getMessage()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_missing_package_is_named_with_its_extra_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A folder of that name is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(TrackingError, match=r"^tracker 'wandb': .* uv pip install 'vipo\[wandb\]'"):
        check_tracker("wandb")


@pytest.mark.parametrize(
    ("name", "told"), [("no_such_module:Board", "cannot be imported"), (f"{MODULE}EXPECTED", "is nothing that can be")]
)
def test_an_import_path_is_tried_before_anything_is_computed(name: str, told: str) -> None:
    with pytest.raises(TrackingError, match=told):
        check_imports(_config(name))


def test_an_unknown_tracker_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.trackers: 'tensorbord' .* did you mean 'tensorboard'"):
        _config("tensorbord")


def test_another_tracker_or_rhythm_of_sheets_trains_nothing_again() -> None:
    other = load_config(["experiment=demo", "arm=vipo", "tracking={trackers: [mlflow], sheet_every: null}"])
    config = _config("tensorboard")
    assert other.tracking != config.tracking
    for identity in ("training", "evaluation", "embeddings", "prompts", "report"):
        assert getattr(other, f"{identity}_identity")() == getattr(config, f"{identity}_identity")()
