"""The DAG through snakemake, in a project folder of its own: runs, does nothing twice, reruns exactly what changed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from bad_rewards import standing
from nursery import Nurseries
from waits import SECONDS, ended, eventually

from vipo.config.compose import repository_root
from vipo.provenance.locks import run_lock
from vipo.provenance.records import experiment_files

ROOT = repository_root()

ARMS = [
    "~experiment.arms.product",
    "~experiment.arms.inverted",
    "experiment.arms.grpo.seeds=[0]",
    "experiment.arms.vipo.seeds=[0]",
]

# A training that a test may let stand still.
REWARD = "reward.terms=[{name: 'bad_rewards:Stands'}]"

REPORTS = {"compare", "summarize", "report", "crate"}


@pytest.fixture(scope="module", autouse=True)
def programs(forks: Nurseries) -> Iterator[None]:
    """Snakemake and the stages are forks."""
    with pytest.MonkeyPatch.context() as patch:
        tools = [str(forks.need("vipo", "snakemake")), str(Path(sys.executable).parent), os.environ["PATH"]]
        patch.setenv("PATH", os.pathsep.join(tools))
        yield


def _environment(**more: object) -> dict[str, str]:
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    return os.environ | here | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in more.items()}


def _snakemake(project: Path, overrides: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["snakemake", "--profile", "workflow/profiles/local", *arguments, "--config", "experiment=demo"]
    command.append(f"overrides={json.dumps(overrides)}")
    return subprocess.run(command, cwd=project, env=_environment(), text=True, capture_output=True)


def _inputs(project: Path, overrides: list[str]) -> dict[str, set[str]]:
    """What each job reads that a dry run would do, by ``rule`` or ``rule run``."""
    result = _snakemake(project, overrides, "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    text = result.stdout + result.stderr
    jobs = {}
    for block in re.split(r"\n(?=(?:local)?rule )", text):
        name = re.match(r"(?:local)?rule (\w+):", block)
        if name and name[1] != "all":
            run = re.search(r"wildcards: run=([\w-]+)", block)
            read = re.search(r"^ +input: (.*)$", block, re.MULTILINE)
            jobs[f"{name[1]} {run[1]}" if run else name[1]] = set() if read is None else set(read[1].split(", "))
    if not jobs:
        assert "Nothing to be done" in text
    return jobs


def _planned(project: Path, overrides: list[str]) -> set[str]:
    """Jobs that a dry run would do, as ``rule`` or ``rule run``."""
    return set(_inputs(project, overrides))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout holds beside the package."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("configs", "workflow", "data/prompts"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Snakefile", "requirements.lock", "CITATION.cff"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def overrides(project: Path, tiny_overrides: list[str], tiny_generator: Path) -> list[str]:
    """Three small runs on a generator that a test may change."""
    if not (project / "generator").is_dir():
        shutil.copytree(tiny_generator, project / "generator")
    kept = [text for text in tiny_overrides if not text.startswith(("experiment=", "generator.path="))]
    return [*kept, "generator.path=generator", *ARMS, REWARD]


@pytest.fixture
def finished(project: Path, overrides: list[str]) -> Path:
    """The experiment's results, made once for all tests of this file."""
    if not (project / "results/demo/ro-crate-metadata.json").is_file():
        result = _snakemake(project, overrides)
        assert result.returncode == 0, result.stdout + result.stderr
        _first_log(project).write_text(result.stderr)
    return project / "results/demo"


def _first_log(project: Path) -> Path:
    return project.parent / "first-run.log"


def test_dag_runs_once_and_reruns_what_changed(
    project: Path, overrides: list[str], request: pytest.FixtureRequest
) -> None:
    runs = ["base-s0", "grpo-s0", "vipo-s0"]
    trained, stages = runs[1:], {"prepare", "encode", *REPORTS}
    everything = (
        stages
        | {f"{stage} {run}" for stage in ("sample", "score") for run in runs}
        | {f"train {run}" for run in trained}
    )
    assert _planned(project, overrides) == everything

    experiment: Path = request.getfixturevalue("finished")
    told = _first_log(project).read_text()
    # A line a job, then that it is done; what stages and Snakemake say is in the logs.
    lines = [line for line in told.splitlines() if not line.startswith(("  ", "Using profile "))]
    count = len(everything)
    assert [line.split("]")[0] for line in lines[:-1]] == [f"[{n}/{count}" for n in range(1, count + 1)], told
    assert re.search(r"^\[\d+/\d+\] train vipo-s0: .* s, reward -?\d\.\d+ -> -?\d\.\d+", told, re.MULTILINE)
    assert lines[-1].startswith(f"{count} jobs done in ")
    logs = {path.stem: path.read_text() for path in (experiment / "logs").iterdir()}
    assert "vipo-s0: samples: 100%" in logs["sample-vipo-s0"]
    assert "16/16" in logs["sample-vipo-s0"]
    assert not [name for name, text in logs.items() if "Loading " in text]
    page = (experiment / "report/index.html").read_text()
    assert "Redder objects" in page
    assert (experiment / "ro-crate-metadata.json").is_file()
    scores = pd.concat(pd.read_parquet(experiment / f"evaluation/{run}/scores.parquet") for run in runs)
    assert set(scores.groupby("run")["update"].unique().map(list).map(tuple)) == {(0,), (2, 4)}
    assert scores.groupby(["run", "update"]).size().unique().tolist() == [8]
    base = scores[scores["run"] == "base-s0"]
    assert float(base["change/total"].abs().max()) == 0
    assert {path.name for path in project.iterdir()} <= {
        "configs", "workflow", "data", "generator", "Snakefile", "requirements.lock", "CITATION.cff", "results",
        ".snakemake",
    }  # fmt: skip

    configurations = _bytes(experiment / "configs")
    # A finished experiment: nothing to do, whatever comment is added to a configuration.
    demo = project / "configs/experiment/demo.yaml"
    demo.write_text(demo.read_text() + "\n# A comment changes nothing.\n")
    assert _planned(project, overrides) == set()

    # One arm's learning rate: its run, its evaluation, the report and the crate, nothing else.
    changed = [*overrides, 'experiment.arms.grpo.overrides=["optimizer.learning_rate=1e-4"]']
    assert _planned(project, changed) == {"train grpo-s0", "sample grpo-s0", "score grpo-s0", *REPORTS}
    # How the report draws its intervals is no reason to train.
    assert _planned(project, [*overrides, "evaluation.confidence=0.9"]) == REPORTS
    # How many checkpoints are kept changes no result, nor where the jobs run.
    moved = ["cluster.train.partition=long", "cluster.account=chem", "distribution.timeout_seconds=60"]
    moved.append("training.keep_checkpoints=3")
    assert _planned(project, [*overrides, *moved]) == set()
    eta = _planned(project, [*overrides, "sampling.eta=0.5"])
    assert eta == {*(f"{stage} {run}" for stage in ("train", "sample", "score") for run in trained), *REPORTS}
    # What only plans leaves alone what jobs of a running workflow read.
    assert _bytes(experiment / "configs") == configurations


def _bytes(folder: Path) -> dict[str, bytes]:
    """All files but those that Snakemake and locks leave, and logs."""
    return {
        name: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not re.search(r"/\.|^(logs|\.)", name := path.relative_to(folder).as_posix())
    }


def _edit(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


ROW = "data/prompts/colourless.jsonl"


@pytest.mark.parametrize(
    ("changed", "more", "told"),
    [
        ("row", (), (f"prompts: changed since: {ROW}\n", "embeddings: ", "runs: grpo-s0, vipo-s0", "base-s0, ")),
        ("generator", (), ("embeddings: changed since: generator/vae/config.json\n", "runs: grpo-s0, vipo-s0\n")),
        ("arm", (), ("runs: grpo-s0 (its configuration changed)\n", "evaluation: grpo-s0\n")),
        (None, ("--forcerun", "encode"), ("embeddings: forced\n", "runs: grpo-s0, vipo-s0", "evaluation: base-s0")),
    ],
    ids=["a prompt's row", "the generator", "one arm's configuration", "--forcerun"],
)
def test_finished_results_are_not_replaced_unasked(
    project: Path,
    overrides: list[str],
    finished: Path,
    changed: str | None,
    more: tuple[str, ...],
    told: tuple[str, ...],
) -> None:
    before = _bytes(finished)
    kept = {project / name: (project / name).read_bytes() for name in (ROW, "generator/vae/config.json")}
    times = {path: path.stat() for path in kept}
    if changed == "row":
        _edit(project / ROW, b"{", b'{"note": "mended", ')
    elif changed == "generator":
        _edit(project / "generator/vae/config.json", b"{", b"{ ")
    elif changed == "arm":
        overrides = [*overrides, 'experiment.arms.grpo.overrides=["optimizer.learning_rate=1e-4"]']
    try:
        result = _snakemake(project, overrides, *more)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
            os.utime(path, ns=(times[path].st_atime_ns, times[path].st_mtime_ns))
    shown = result.stdout + result.stderr
    assert result.returncode != 0
    assert "nothing was touched" in shown
    assert all(text in shown for text in (*told, "experiment.name=NAME"))
    # The last word is the command to type, whole.
    assert re.fullmatch(
        r"to go on under this name: snakemake .* --config set_aside=true experiment=demo .*", shown.splitlines()[-1]
    )
    assert _bytes(finished) == before
    assert not (finished / ".superseded").exists()


def _stopped(
    project: Path, overrides: list[str], told: str, when: Callable[[], bool], number: int, *config: str, **more: object
) -> None:
    """Start snakemake, and send it a signal as soon as `when` holds; `more` is its environment's."""
    command = ["snakemake", "--profile", "workflow/profiles/local", "--config", "experiment=demo", *config]
    said = project.parent / "stopped.log"
    with said.open("w") as stream:
        process = subprocess.Popen(
            [*command, f"overrides={json.dumps(overrides)}"],
            cwd=project, env=_environment(**more), stdout=stream, stderr=stream, process_group=0,
        )  # fmt: skip
    eventually(told, when, ended(process, said))
    # As a terminal does, and a scheduler that has lost its patience: to everything that it started.
    os.killpg(process.pid, number)
    process.wait(SECONDS)


def test_what_is_replaced_with_consent_is_set_aside_whole(project: Path, overrides: list[str], finished: Path) -> None:
    """And stays so, while the rerun is interrupted, killed and taken up again by the same command without consent."""
    before = _bytes(finished)
    changed = [*overrides, 'experiment.arms.grpo.overrides=["optimizer.learning_rate=1e-4"]']
    run, evaluation = finished / "runs/grpo-s0", finished / "evaluation/grpo-s0"
    armed = project.parent / "armed"
    armed.touch()
    # In the second update: a trial, and two micro-batches an update.
    stand, stands = {"STAND": armed, "STAND_AT": 4}, standing(armed).exists
    _stopped(project, changed, "training stands still", stands, signal.SIGINT, "set_aside=true", **stand)
    assert (finished / ".superseded").is_dir()
    assert not (run / "weights").exists()
    assert any((run / "checkpoints").iterdir())
    # Who waits for the report's lock does not come to the end before it is killed.
    with run_lock(finished / "report"):
        begun = (evaluation / ".lock-holder.json").is_file
        _stopped(project, changed, "an evaluation has begun", begun, signal.SIGKILL)
    for arguments in (["--unlock"], []):
        result = _snakemake(project, changed, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
    (aside,) = (finished / ".superseded").iterdir()
    places = r"(runs|samples|evaluation)/grpo-s0/|report/(data/|index|time|prov)|comparison/|crate/|ro-crate"
    assert _bytes(aside) == {name: content for name, content in before.items() if re.match(places, name)}
    after = _bytes(finished)
    same = [name for name in after if not re.match(rf"{places}|configs/", name)]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert after["runs/grpo-s0/metrics.jsonl"] != before["runs/grpo-s0/metrics.jsonl"]
    assert _planned(project, changed) == set()
    # The set that was moved is no part of the experiment.
    assert not any("superseded" in name for name in experiment_files(finished))


def test_shares_of_samples_and_scores_are_jobs_and_all_arms_share_one_base(project: Path, overrides: list[str]) -> None:
    jobs = _planned(project, [*overrides, "experiment.name=shared", "cluster.shares=2"])
    runs = ("base-s0", "grpo-s0", "vipo-s0")
    assert jobs >= {f"{stage} {run}" for stage in ("sample_share", "sample", "score_share", "score") for run in runs}
    changed = [*overrides, 'experiment.arms.grpo.overrides=["sampling.shift=3.0"]']
    result = _snakemake(project, changed, "--dry-run")
    assert result.returncode != 0
    assert "change how samples are drawn" in result.stdout + result.stderr


def test_what_decides_a_result_is_read_by_its_job_through_links_too(
    project: Path, overrides: list[str], tmp_path: Path
) -> None:
    for path in (project / "generator").iterdir():
        (tmp_path / path.name).symlink_to(path)
    read = _inputs(project, [*overrides, "experiment.name=linked", f"generator.path={tmp_path}"])
    names = ("model_index.json", "transformer/config.json", "vae/config.json")
    wanted = {str(tmp_path / name) for name in names}
    for job in ("encode", "train vipo-s0", "sample base-s0"):
        assert wanted < read[job]


def test_local_weights_of_rewards_and_backbone_are_read_by_what_they_decide(
    project: Path, overrides: list[str], tmp_path: Path
) -> None:
    clip = {str(tmp_path / "clip" / name) for name in ("config.json", "model.safetensors")}
    head, net = {str(tmp_path / "head.pth")}, {str(tmp_path / "net.safetensors")}
    (tmp_path / "clip").mkdir()
    for name in (*clip, *head, *net, "clip/notes.md"):
        (tmp_path / name).touch()
    chosen = [text for text in overrides if text != REWARD]
    chosen += ["experiment.name=weights", f"perception.weights={tmp_path}/net.safetensors"]
    chosen.append(f"reward.terms=[{{name: clipscore, options: {{path: {tmp_path}/clip}}}}]")
    chosen.append(f"evaluation.rewards=[{{name: aesthetic, options: {{path: no/such, head: {tmp_path}/head.pth}}}}]")
    read = _inputs(project, [*chosen, "experiment.meter.arms=[grpo,vipo]"])
    found = {job: {name for name in names if name.startswith(str(tmp_path))} for job, names in read.items()}
    assert found["train vipo-s0"] == found["credit"] == clip | net
    assert found["score vipo-s0"] == found["score base-s0"] == clip | head | net
    assert not found["sample vipo-s0"]


def test_an_arm_cannot_ask_for_other_jobs_than_the_rest(project: Path, tiny_overrides: list[str]) -> None:
    result = _snakemake(
        project, [*ARMS, 'experiment.arms.grpo.overrides=["cluster.train.memory_mb=9000"]'], "--dry-run"
    )
    assert result.returncode != 0
    assert "run grpo-s0 changes its cluster, distribution, device or threads" in result.stdout + result.stderr


def test_wrong_key_stops_before_anything_runs(project: Path, tiny_overrides: list[str]) -> None:
    result = _snakemake(project, ["training.updtes=3"])
    assert result.returncode != 0
    assert "error: experiment demo: training.updtes: unknown key; did you mean 'updates'?" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("to go on: mend that, then snakemake --profile ")
