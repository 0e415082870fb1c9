"""Every line that the docs say to type is typed (workflows: planned) where the demo is tiny, or listed, and why."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from films import moving, write_film
from nursery import Nurseries
from PIL import Image

from vipo.cli import app
from vipo.config.compose import load_config, repository_root

ROOT = repository_root()
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = (
    *("vipo", "snakemake", "make", "python", "dvc", "tensorboard", "hf", "git", "docker", "sinfo", "srun", "pytest"),
    *("sudo", "bash", "cd", "mkdir", "rm", "export", "until", "node", r"VIPO_REWARD_TOKEN=\S+", r"PYTHONPATH=\S+"),
)
_COMMANDS = re.compile(rf"({'|'.join(_PROGRAMS)})\s")
# What a page leaves open, and what is typed there.
_OPEN = {"=NAME": "=demo", " overrides=…": ""}

# What a page's options need of the demo.
LARGER = {
    "docs/cluster.md": {"micro_batch": 1, "optimizer_steps_per_update": 1},
    "docs/memory.md": {"updates": 3, "trained_transitions": 4, "steps": 5},
}

# Whole pages, and beginnings of lines, by the test that types them, or their like in small.
ELSEWHERE = {
    "e2e/test_tutorial.py::test_the_tutorial_is_followed": ["docs/tutorial.md", "PYTHONPATH=$PWD/rewards snakemake"],
    "e2e/test_resume_docs.py::test_its_commands_do_what_it_says": ["docs/resume.md"],
    "integration/test_handover.py::test_the_commands_of_the_documentation": [
        *("docs/compare.md", "docs/handover.md", "vipo export results/demo/runs/vipo-s0"),
    ],
    "integration/test_forward_objectives.py::test_the_page_s_commands_train": ["docs/forward_process.md"],
    "integration/test_credit_meter.py::test_the_pages_commands": ["vipo credit experiment=demo"],
    "integration/test_credit_meter.py::test_it_is_a_stage_of_an_experiment_that_asks_for_it": [
        "snakemake --profile local --config experiment=demo overrides='[experiment.meter.arms=[grpo,vipo,inverted]]'",
    ],
    "integration/test_report_watch.py::test_the_command_watches": ["vipo report experiment=demo --watch"],
    "unit/test_trackers.py::test_the_pages_commands_are_the_viewers_own": ["tensorboard --logdir results/demo/runs"],
    "unit/test_signature.py::test_ssh_keygen_alone_checks_it_as_the_page_says": ["ssh-keygen -Y verify"],
    "integration/test_benchmarks.py::test_one_command_compares_the_maps_and_gives_their_share_of_a_training_step": [
        "python -m benchmarks.perception",
    ],
    "integration/test_benchmarks.py::test_an_update_asks_for_no_more_than_reviewed": ["python -m benchmarks.compare"],
    "integration/test_benchmarks.py::test_an_update_s_time_is_told_by_part": ["python -m benchmarks.update_share"],
    "integration/test_benchmarks.py::test_the_curves_are_drawn_from_their_figures": [
        "python -m benchmarks.growth benchmarks/growth.json --draw",
    ],
    "integration/test_benchmarks.py::test_the_pitfalls_are_measured": ["python -m benchmarks.pitfalls"],
    "integration/test_demo_generator.py::test_rebuild_is_reproducible_and_resumable": ["vipo base experiment=demo"],
    "integration/test_upload.py::test_s3_through_the_command_line": ["vipo upload results/demo s3://"],
    "integration/test_kernels.py::test_a_run_of_compiled_blocks_is_the_same_run": [
        "vipo train experiment=demo arm=vipo generator.compile=blocks",
    ],
    "integration/test_families.py::test_it_is_the_stock_pipeline_and_trains": [
        *("vipo check-generator generator=sd35_medium", "vipo train experiment=... generator=sd35_medium"),
    ],
    "integration/test_orientation.py::test_the_table": ["vipo orientation "],
    "e2e/test_dvc.py::test_same_result_twice": ["dvc repro", "make demo && make dvc-commit"],
    "e2e/test_dvc.py::test_after_a_pull_one_command_makes_snakemake_see_the_results": ["dvc pull && make dvc-import"],
    "e2e/test_distribution.py::test_other_numbers_of_processes_reach_the_same_weights": [
        *("vipo train experiment=NAME arm=vipo distribution.processes=8",),
        "vipo train experiment=demo arm=vipo training.micro_batch=1 distribution.processes=8",
    ],
    "system/test_slurm.py::test_two_nodes_train_one_run_and_stop_together": ["srun --nodes=2"],
    "unit/test_reward_process_docs.py::test_the_other_commands_are_there": [
        *("VIPO_REWARD_TOKEN=... vipo serve-reward hpsv3", "VIPO_REWARD_TOKEN=... envs/hpsv3"),
    ],
    "unit/test_reward_process_docs.py::test_a_picture_is_scored_beside_or_the_reason_told": ["vipo score-beside hpsv2"],
    # 27 to 140 runs each: their plan alone takes half a minute.
    "unit/test_config.py::test_every_arm_of_every_experiment_composes": [
        *(f"snakemake --profile local --config experiment={name}" for name in ("credit2", "objectives", "lora")),
        "snakemake --profile local --config experiment=collapse",
    ],
    "e2e/test_apptainer.py::test_every_stage_runs_in_the_image_and_records_its_digest": [
        "snakemake --profile local --sdm apptainer",
    ],
    "integration/test_cloud.py::test_the_commands_of_the_page_exist": [
        *(
            "export VIPO_IMAGE_DIGEST=",
            "node() {",
            "node ",
            "until node",
            "mkdir -p results && docker run",
        ),
    ],
}
NOT_RUN = {
    "the environment of the tests is made already": [
        *("make env", "source .venv/bin/activate", "sudo apt-get", "git clone", "export HTTPS_PROXY="),
    ],
    "a folder of the reader's site": ["export HF_HOME="],
    "this suite, or what contains it": ["make test", "pytest -k resume", "bash .ci/run"],
    "minutes to hours of all cores; `make demo` is the first thing that CONTRIBUTING.md asks for": [
        *("make demo", "make study", "make meter-demo", "python -m benchmarks.growth benchmarks/growth.json"),
    ],
    "an image or a registry, a cluster in the cloud: containers/test.sh builds and runs the image": [
        *("make image", "make sif", "docker tag", "digest=", "kubectl create", "sed "),
    ],
    "the hub": ["hf download", "vipo check experiment=flux_hps", "vipo plan experiment=flux_hps"],
    "a Slurm cluster": ["sinfo "],
    "reads what hours of runs left; on made-up scores in test_study.py and test_registered.py": [
        *("vipo study collapse", "vipo registered "),
    ],
    "bitsandbytes, which the lock leaves out": ["vipo train experiment=demo arm=vipo optimizer=adamw_8bit"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language (commands: `bash`), what it holds, and the file's name that the page gives it."""

    language: str
    text: str
    name: str | None

    def lines(self) -> Iterator[str]:
        """What a shell runs, without comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            typed = re.sub(r"(^|\s+)# .*", "", line).strip()
            if typed and not typed.startswith("--volume"):
                yield typed


def blocks(page: str) -> Iterator[Block]:
    """The page's blocks; of no language: what commands print, and what is drawn with characters."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        _, language, content = found.groups()
        named = re.search(r"Save (?:this )?as\s+`(\w+\.py)`[^`]*(`[^`]*`[^`]*)?$", text[: found.start()])
        yield Block(language or ("bash" if _COMMANDS.match(content) else ""), content, named and named[1])


def _listed(page: str, line: str) -> bool:
    begins = [*(start for starts in (*ELSEWHERE.values(), *NOT_RUN.values()) for start in starts)]
    return page in begins or any(line.startswith(start) for start in begins)


def _first(line: str) -> str:
    """The page that a line is typed for, where several have it."""
    return next(page for page in PAGES for block in blocks(page) if line in block.lines())


def test_what_is_listed_is_there() -> None:
    lines = [line for page in PAGES for block in blocks(page) if block.language == "bash" for line in block.lines()]
    assert len(lines) > 150
    for listed in (ELSEWHERE, NOT_RUN):
        for starts in listed.values():
            for start in starts:
                assert start in PAGES or any(line.startswith(start) for line in lines), f"{start}: in no page"
    for test in ELSEWHERE:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def _left_out() -> list[str]:
    """Lines of vipo's own that are listed."""
    found = {line for page in PAGES for block in blocks(page) for line in block.lines() if _listed(page, line)}
    return sorted(line for line in found if re.match(r"vipo [a-z]", line) and "|" not in line)


@pytest.mark.parametrize("line", _left_out())
def test_a_line_that_is_left_out_parses_and_composes(line: str) -> None:
    group, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    assert isinstance(group, typer.core.TyperGroup)
    with group.make_context("vipo", words) as context:
        name, subcommand, rest = group.resolve_command(context, words)
    assert subcommand is not None
    with subcommand.make_context(name, rest) as parsed:
        given = [re.sub(r"=(mine|NAME|\.\.\.)$", "=demo", each) for each in parsed.params.get("overrides") or ()]
    # Not every command takes an experiment.
    if given:
        load_config(given if given[0].startswith("experiment=") else ["experiment=demo", *given])


def test_no_block_is_of_a_kind_that_nothing_runs() -> None:
    kinds = {(page if block.language == "" else "", block.language) for page in PAGES for block in blocks(page)}
    shown = {(f"docs/{page}.md", "") for page in ("audit", "compare", "credit", "design", "method")}
    assert kinds == {("", "bash"), ("", "python"), ("", "yaml")} | shown


@pytest.fixture(scope="module")
def checkout(signed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the tiny demo finished, and what the pages take for granted beside it."""
    folder = Path(shutil.copytree(signed, tmp_path_factory.mktemp("docs") / "checkout", symlinks=True))
    for name in ("local", "slurm"):
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    (folder / "data" / "demo-generator").symlink_to("generator")
    shutil.copy(folder / "configs" / "cluster" / "default.yaml", folder / "configs" / "cluster" / "mysite.yaml")
    for made, told in (("ada.key", "KEY"), ("ada.key.pub", "KEY.pub"), ("ada.signers", "keys")):
        shutil.copy(signed.parent / made, folder / told)
    photo = Image.effect_mandelbrot((320, 240), (-2, -1.2, 1, 1.2), 50).convert("RGB")
    photo.save(folder / "photo.jpg")
    write_film(folder / "film.mp4", moving())
    (folder / "folder").mkdir()
    photo.save(folder / "folder" / "photo.png")
    # What pages tell to save, and rewards/ is one page's name of the place.
    (folder / "written").mkdir()
    (folder / "rewards").symlink_to("written")
    for page in PAGES:
        for block in blocks(page):
            if block.name:
                (folder / "written" / block.name).write_text(block.text)
    return folder


@pytest.fixture
def typed(forks: Nurseries) -> dict[str, str]:
    """The environment of a shell that finds vipo and snakemake, and what the pages told to save."""
    path = f"{forks.need('vipo', 'snakemake')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": "written"}


@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_says_to_type(page: str, checkout: Path, typed: dict[str, str], tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page)):
        if block.language != "bash":
            continue
        lines = [line for line in block.lines() if not _listed(page, line) and _first(line) == page]
        if not lines:
            continue
        place = Path(shutil.copytree(checkout, tmp_path / str(number), symlinks=True))
        _set(place / "configs" / "experiment" / "demo.yaml", LARGER.get(page, {}))
        for line in lines:
            _type(line, place, typed)


def _set(path: Path, values: Mapping[str, int]) -> None:
    text = path.read_text()
    for key, value in values.items():
        text, count = re.subn(rf"^( +{key}): .*", rf"\g<1>: {value}", text, flags=re.MULTILINE)
        assert count, key
    path.write_text(text)


def _type(line: str, place: Path, environment: dict[str, str]) -> None:
    for left, filled in _OPEN.items():
        line = line.replace(left, filled)
    results, aside = place / "results", place / "aside"
    planned = "snakemake " in line
    if planned:
        # Hours, as they stand: their plan, of an experiment of which there is nothing yet.
        line = line.replace("snakemake ", "snakemake --dry-run --quiet ")
        results.rename(aside)
    command = ["bash", "-euo", "pipefail", "-c", line]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if planned:
        shutil.rmtree(results, ignore_errors=True)
        aside.rename(results)


# The tutorial is followed whole, the other page's are held by test_parts.py: over the demo's own objective they are
# overrides, as the page says.
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("docs/tutorial.md", "docs/objectives.md")])
def test_what_the_page_says_to_write(page: str, checkout: Path, forks: Nurseries) -> None:
    """Programs run, and what they define is defined; configurations compose, on the demo."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "written")}
    for number, block in enumerate(blocks(page)):
        if block.language == "python":
            (written := checkout / "program.py").write_text(block.text)
            status, _, told = forks.run(written, cwd=checkout, env=environment)
        elif block.language == "yaml":
            name = f"{Path(page).stem}_{number}"
            base = "credit2" if page == "docs/registered.md" else "demo"
            begun = f"# @package _global_\ndefaults: [{base}, _self_]\n"
            (checkout / "configs" / "experiment" / f"{name}.yaml").write_text(begun + block.text)
            command = Path(sys.executable).with_name("vipo")
            status, _, told = forks.run(command, "config", f"experiment={name}", cwd=checkout, env=environment)
        else:
            continue
        assert status == 0, f"{block.text}\n{told[-2000:]}"
