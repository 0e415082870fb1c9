"""Rows survive a kill and a resume byte for byte; times add up by part."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vipo.tracking.rows import Rows, TrackingError
from vipo.tracking.timer import Timer


def _metrics(update: int) -> dict[str, float]:
    return {"reward/mean": math.sin(update) / 3, "grad/norm": 10.0**-update, "clip/share": update / 7}


def _run(folder: Path, start: int, stop: int) -> None:
    with Rows(folder, start) as rows:
        for update in range(start + 1, stop + 1):
            rows.log(update, _metrics(update), {"time/rollout": update * 0.25})


def test_rows_are_sorted_and_exact(tmp_path: Path) -> None:
    _run(tmp_path, 0, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"clip/share": 0.14285714285714285, "grad/norm": 0.1, "reward/mean": %r, "update": 1}' % (
        math.sin(1) / 3
    )
    rows = [json.loads(line) for line in lines]
    assert rows == [{"update": update, **_metrics(update)} for update in (1, 2)]
    assert json.loads((tmp_path / "timing.jsonl").read_text().splitlines()[1]) == {"update": 2, "time/rollout": 0.5}


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_killed_anywhere_and_resumed_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, whole = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    _run(whole, 0, 6)
    expected = (whole / "metrics.jsonl").read_bytes()
    _run(folder, 0, 5)
    checkpoint = data.draw(st.integers(0, 5), label="checkpoint")
    written = (folder / "metrics.jsonl").read_bytes()
    durable = sum(len(line) for line in written.splitlines(keepends=True)[:checkpoint])
    torn = written[: data.draw(st.integers(durable, len(written)), label="bytes that reached the disk")]
    garbage = data.draw(st.sampled_from([b"", b"\0\0\0\0", b'{"update": ', b"\xff\n", b"[]\n"]), label="tail")
    for name in ("metrics.jsonl", "timing.jsonl"):
        (folder / name).write_bytes(torn + garbage)
    _run(folder, checkpoint, 6)
    assert (folder / "metrics.jsonl").read_bytes() == expected
    assert [json.loads(line)["update"] for line in (folder / "timing.jsonl").open()] == [1, 2, 3, 4, 5, 6]


def test_rows_that_the_checkpoint_has_seen_must_be_there(tmp_path: Path) -> None:
    _run(tmp_path, 0, 5)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    damaged = "".join([*lines[:2], "x" + lines[2][1:], *lines[3:]])
    path.write_text(damaged)
    with pytest.raises(TrackingError, match=r"metrics\.jsonl: readable up to update 2, .* has done 4"):
        Rows(tmp_path, 4)
    assert path.read_text() == damaged


def test_a_last_row_without_its_end_is_no_row(tmp_path: Path) -> None:
    _run(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrackingError, match="readable up to update 1,"):
        Rows(tmp_path, 2)


def test_lost_times_stop_nothing(tmp_path: Path) -> None:
    _run(tmp_path, 0, 3)
    (tmp_path / "timing.jsonl").unlink()
    _run(tmp_path, 3, 4)
    assert json.loads((tmp_path / "timing.jsonl").read_text())["update"] == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_and_nothing_written(tmp_path: Path, value: float) -> None:
    with Rows(tmp_path, 0) as rows:
        with pytest.raises(ValueError, match=r"'reward/mean' is .* at update 1"):
            rows.log(1, {"grad/norm": 1.0, "reward/mean": value}, {})
        with pytest.raises(ValueError, match="'time/learn' is"):
            rows.log(1, {"grad/norm": 1.0}, {"time/learn": value})
        rows.log(1, {"grad/norm": 1.0}, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"grad/norm": 1.0, "update": 1}\n'


@pytest.mark.parametrize("update", [-1, 0, 2])
def test_rows_have_no_gaps(tmp_path: Path, update: int) -> None:
    with Rows(tmp_path, 0) as rows, pytest.raises(ValueError, match=f"update {update} does not follow update 0"):
        rows.log(update, {}, {})


def test_a_value_cannot_replace_the_row_number(tmp_path: Path) -> None:
    with Rows(tmp_path, 0) as rows, pytest.raises(ValueError, match="'update' numbers the row"):
        rows.log(1, {"update": 3.0}, {})


def test_a_refused_write_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Rows(tmp_path, 0) as rows, monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(TrackingError, match=r"No space left on device.*free disk space"):
            rows.flush()


def test_rows_are_visible_before_flush(tmp_path: Path) -> None:
    with Rows(tmp_path, 0) as rows:
        rows.log(1, _metrics(1), {})
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["update"] == 1


def test_metrics_outlive_their_file(tmp_path: Path) -> None:
    """A workflow deletes the outputs of a job that it takes for dead; the job's last checkpoint needs them."""
    _run(tmp_path, 0, 3)
    with Rows(tmp_path, 2) as rows:
        for update in (3, 4):
            rows.log(update, _metrics(update), {})
        whole = (tmp_path / "metrics.jsonl").read_text()
        (tmp_path / "metrics.jsonl").unlink()
        rows.flush()
        assert rows.metrics == whole
    assert whole.count("\n") == 4


def test_history_is_what_the_checkpoint_has_seen_and_times_that_are_left(tmp_path: Path) -> None:
    _run(tmp_path, 0, 4)
    timing = tmp_path / "timing.jsonl"
    timing.write_text("".join(timing.read_text().splitlines(keepends=True)[:2]))
    with Rows(tmp_path, 3) as rows:
        assert rows.history() == [
            {**_metrics(1), "time/rollout": 0.25},
            {**_metrics(2), "time/rollout": 0.5},
            _metrics(3),
        ]


def test_timer_adds_up_by_part_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.5, 20.0, 20.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = Timer("cpu")
    with timer("rollout"):
        pass
    with timer("reward"):
        pass
    with timer("rollout"):
        pass
    assert timer.pop() == {"time/rollout": 2.25, "time/reward": 1.5}
    assert timer.pop() == {}


def test_timer_counts_a_part_that_fails() -> None:
    timer = Timer("cpu")
    with pytest.raises(KeyError), timer("reward"):
        raise KeyError
    assert timer.pop()["time/reward"] >= 0


def test_timer_waits_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    with Timer("cuda:0")("learn"):
        assert len(waited) == 1
    assert [str(device) for device in waited] == ["cuda:0", "cuda:0"]
