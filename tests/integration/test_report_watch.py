"""`vipo report --watch`: the page of runs that still train."""

import json
import re
import shutil
from pathlib import Path

import pytest
from integration.report_fixture import build_experiment

from vipo.config.compose import load_config_file
from vipo.reporting.inputs import ReportError
from vipo.reporting.watch import build_live, watch_report

pytest_plugins = ["command"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, runs = build_experiment(tmp_path_factory.mktemp("watch"), {"base": [0], "grpo": [0], "vipo": [0]})
    for run in runs[1:]:
        shutil.copy(folder / "evaluation" / run / "config.yaml", folder / "runs" / run / "config.yaml")
    return folder, runs


def test_the_page_grows_with_what_there_is(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, runs = Path(shutil.copytree(built[0], tmp_path / "demo")), built[1]
    config = load_config_file(folder / "evaluation" / "base-s0" / "config.yaml")
    evaluated = folder / "evaluation"
    evaluated.rename(tmp_path / "evaluation")
    metrics = folder / "runs" / "vipo-s0" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:5]))

    page = build_live(folder, runs, config).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', page)[:2] == ["progress", "training"]
    # By itself only where there is no script, which asks whether the reader is busy.
    assert '<noscript><meta http-equiv="refresh" content="15"></noscript>' in page
    assert page.count('http-equiv="refresh"') == 1
    rows = re.findall(r'<td class="n">(.*?)</td>', page.split('id="progress"')[1].split("</section>")[0])
    assert rows[0::2] == ["—", "24 of 24", "not begun", "not begun", "5 of 24", "not begun", "not begun"]
    # What only a finished run has is not missed.
    assert "Fewer updates than configured" not in page
    assert "Records of the training are not here" not in page
    assert "data/report.json" not in page
    assert 'id="training"' in page
    assert 'id="result"' not in page
    assert "Training reward" in page
    # The legend's colours are the curves', and they stay when the base is evaluated.
    legend = '<span class="arm" data-arm="1" style="--swatch: var(--arm-1)">grpo</span>'
    assert legend in page

    # Half a line, as a reader may meet it: said, and the page before stays.
    metrics.write_text(whole[:-30])
    with pytest.raises(ReportError, match=r"metrics\.jsonl, line \d+: is not JSON"):
        build_live(folder, runs, config)
    assert (folder / "live.html").read_text(encoding="utf-8") == page

    metrics.write_text(whole)
    evaluated.mkdir()
    for run in ("base-s0", "grpo-s0"):
        shutil.copytree(tmp_path / "evaluation" / run, evaluated / run)
    page = build_live(folder, runs, config).read_text(encoding="utf-8")
    assert 'id="result"' in page
    assert legend in page
    data = json.loads(page.split('id="page-data">')[1].split("</script>")[0])
    assert [run["name"] for run in data["runs"]] == ["base-s0", "grpo-s0"]
    # What trains without an evaluation is among the curves.
    assert "vipo" in page.split('id="training"')[1].split("</section>")[0]
    assert {path.name for path in folder.iterdir()} == {"evaluation", "live.html", "prompts", "runs", "samples"}


def test_it_draws_again_when_something_changed_and_says_what_it_waits_for(
    built: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, runs = Path(shutil.copytree(built[0], tmp_path / "demo")), built[1]
    config = load_config_file(folder / "evaluation" / "base-s0" / "config.yaml")
    shutil.rmtree(folder / "evaluation")
    (folder / "runs").rename(tmp_path / "runs")
    said: list[str] = []

    def say(text: object) -> None:
        said.append(str(text))
        if len(said) == 2:
            raise KeyboardInterrupt
        (tmp_path / "runs").rename(folder / "runs")

    with pytest.raises(KeyboardInterrupt):
        watch_report(folder, runs, config, say, 0.05)
    assert said[0].startswith("not yet: ")
    assert said[1] == str(folder / "live.html")


def test_the_command_watches(tmp_path: Path, vipo, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watch(*values: object) -> None:
        asked.append(values)
        # As Ctrl-C, which ends it without an error.
        raise KeyboardInterrupt

    monkeypatch.setattr("vipo.reporting.watch.watch_report", watch)
    done = vipo("report", "experiment=demo", "--results", tmp_path, "--watch", "--every", "2")
    assert done.code == 0, done.err
    ((folder, runs, _, _, every),) = asked
    assert (folder, every) == (tmp_path / "demo", 2)
    assert runs[0] == "base-s0"


def test_nothing_begun_is_an_error_that_says_what_to_start(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    config = load_config_file(built[0] / "evaluation" / "base-s0" / "config.yaml")
    with pytest.raises(ReportError, match="no run has made an update yet; start one with 'vipo train'"):
        build_live(tmp_path / "demo", built[1], config)
