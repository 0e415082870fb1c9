"""`make env` looks first at all it needs: on faked machines, one message each, with what to install."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vipo.config.compose import repository_root

ROOT = repository_root()
TOOLS = ("sh", "sed", "awk", "du", "dirname", "basename", "head", "grep")
PYTHON = """case "$2" in *version_info*) echo {version} ;; *ensurepip*) exit {venv} ;; esac"""

Machine = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Runs the script on a machine whose programs are the named ones: name -> shell code."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    (checkout / "workflow").mkdir(parents=True)
    shutil.copy(ROOT / "workflow/preflight.sh", checkout / "workflow")
    shutil.copy(ROOT / "requirements.lock", checkout)
    programs.mkdir()
    for name in TOOLS:
        (programs / name).symlink_to(shutil.which(name) or "")

    def run(*arguments: str, environment: dict[str, str] | None = None, **code: str | None) -> object:
        usual = {
            "python3": PYTHON.format(version="3.12", venv=0),
            "git": "exit 0",
            "uname": 'case "$1" in -m) echo x86_64 ;; *) echo Linux ;; esac',
            "getconf": "echo glibc 2.36",
            "df": "echo header; echo /dev/sda 100000000 1 50000000 1% /",
        }
        for name, text in (
            usual | {name.replace("_", "-").replace("3-", "3."): text for name, text in code.items()}
        ).items():
            if text is not None:
                # What is written through a link is the machine's own program.
                (programs / name).unlink(missing_ok=True)
                (programs / name).write_text(f"#!/bin/sh\n{text}\n")
                (programs / name).chmod(0o755)
        return subprocess.run(
            [programs / "sh", checkout / "workflow/preflight.sh", *arguments],
            env={"PATH": str(programs), "HOME": str(tmp_path)} | (environment or {}),
            text=True,
            capture_output=True,
        )

    return run  # type: ignore[return-value]


def _advice(result: "subprocess.CompletedProcess[str]") -> list[str]:
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "nothing was made or downloaded" in result.stderr.splitlines()[-1]
    line = re.search(
        r"^on Debian or Ubuntu: sudo apt-get update && sudo apt-get install --yes (.*)$", result.stderr, re.M
    )
    return line[1].split() if line else []


def test_nothing_is_said_where_nothing_is_missing(machine: Machine, tmp_path: Path) -> None:
    result = machine()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert machine("--python").stdout == f"{tmp_path}/bin/python3\n"


def test_a_build_of_pytorch_that_does_not_exist_is_no_choice(machine: Machine) -> None:
    result = machine(environment={"TORCH": "cpu"})
    assert _advice(result) == []
    assert "TORCH=cpu: there is one build of PyTorch to choose; PyPI has no CPU-only one" in result.stderr


def test_all_that_is_missing_is_one_message(machine: Machine) -> None:
    result = machine(
        python3=None, git=None, df="echo header; echo /dev/sda 9 1 2097152 1% /", getconf="exit 1",
        uname='case "$1" in -m) echo armv7l ;; *) echo Linux ;; esac',
    )  # fmt: skip
    assert _advice(result) == ["python3", "python3-venv", "git"]
    for told in ("no python3 here", "git", "9 GB of free disk", "2 GB are free", "armv7l", "another libc"):
        assert told in result.stderr


def test_the_readme_names_what_the_script_looks_for(machine: Machine) -> None:
    asked = re.findall(r"^sudo apt-get .*install --yes (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert len(asked) == 1
    assert set(asked[0].split()) == {*_advice(machine(python3=None, git=None)), "make"}


def test_a_python_without_venv(machine: Machine) -> None:
    assert _advice(machine(python3=PYTHON.format(version="3.11", venv=1))) == ["python3-venv"]
    # An installed uv makes the environment without it.
    assert machine(environment={"UV": "/bin/sh"}).returncode == 0


def test_the_first_fitting_interpreter_is_taken(machine: Machine, tmp_path: Path) -> None:
    old, newer = PYTHON.format(version="3.10", venv=0), PYTHON.format(version="3.12", venv=1)
    assert _advice(machine(python3=old, python3_12=newer)) == ["python3.12-venv"]
    assert machine("--python", python3=old).stdout == f"{tmp_path}/bin/python3.12\n"
    chosen = machine(environment={"PYTHON": "python3"}, python3=old)
    assert "PYTHON=python3 is none" in chosen.stderr
    assert "python3 is 3.10" in chosen.stderr


@pytest.mark.parametrize(
    ("apt", "offered"),
    [
        # Ubuntu 22.04: another version beside its own.
        ('case "$2" in python3) echo Version: 3.10.6 ;; python3.11-venv) ;; *) exit 1 ;; esac', "python3.11"),
        # A release that has none.
        ('case "$2" in python3) echo Version: 3.14.2 ;; *) exit 1 ;; esac', ""),
    ],
)  # fmt: skip
def test_a_python_of_another_version(machine: Machine, apt: str, offered: str) -> None:
    result = machine(python3=PYTHON.format(version="3.10", venv=0), apt_cache=apt)
    assert _advice(result) == ([offered, f"{offered}-venv"] if offered else [])
    assert "python3 is 3.10" in result.stderr
    assert ("make env PYTHON=" in result.stderr) is (not offered)


def test_a_driver_older_than_the_locks_cuda_is_told_and_stops_nothing(machine: Machine) -> None:
    lock = (ROOT / "requirements.lock").read_text()
    cuda = re.search(r"^nvidia-cuda-runtime==(\d+)\.", lock, re.M)
    assert cuda is not None
    result = machine(nvidia_smi="echo 470.82.01")
    assert result.returncode == 0
    assert f"driver here is 470.82.01, and PyTorch in requirements.lock is built for CUDA {cuda[1]}" in result.stderr
    assert machine(nvidia_smi="echo 999.1").stderr == ""
    # No device answers.
    assert machine(nvidia_smi="echo NVIDIA-SMI has failed; exit 9").stderr == ""


def test_a_home_without_a_cache_is_not_counted(machine: Machine, tmp_path: Path) -> None:
    """A full disk; going through everything below a home, or a whole disk, would take minutes."""
    counted = tmp_path / "counted"
    result = machine(df="echo header; echo /dev/sda 100 1 50 1% /", du=f'echo "$@" > {counted}; echo 0 .')
    assert result.returncode == 1
    assert "GB of free disk" in result.stderr
    assert counted.read_text().split() == ["-sk", ".venv", f"{tmp_path}/.cache/uv"]


@pytest.fixture
def make(tmp_path: Path) -> Machine:
    """Runs make in a checkout without environment and installer, as on a fresh machine, in a path with a space.

    Programs in `tmp_path` / "my tools" come before the machine's.
    """
    checkout = tmp_path / "my checkout"
    for name in ("Makefile", "requirements.lock", "pyproject.toml", "workflow/preflight.sh", "containers/rewards"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, checkout / name)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": f"{tmp_path}/my tools:/usr/bin:/bin", "DISK_GB": "0", "HOME": str(tmp_path)}
        return subprocess.run(["make", *arguments], cwd=checkout, text=True, capture_output=True, env=environment)

    return run


@pytest.mark.parametrize("target", ["env", "lock", "reward-env"])
def test_whatever_needs_the_installer_begins_with_it(make: Machine, target: str) -> None:
    tried = make("TORCH=cpu", "NAME=hpsv2", target)
    assert tried.returncode != 0
    # Once, and nothing was tried.
    assert tried.stderr.count("error: `make env` needs what is not here:") == 1
    assert "TORCH=cpu" in tried.stderr
    assert "venv" not in tried.stdout.replace("python3-venv", "")


def test_make_env_shows_how_far_uv_is(make: Machine) -> None:
    shown = make("--dry-run", "env").stdout
    assert "workflow/preflight.sh" in shown.splitlines()[0]
    assert "pip sync" in shown
    assert "--quiet" not in shown


@pytest.mark.parametrize("installed", [True, False], ids=["uv is installed", "uv is made here"])
def test_an_environment_is_made_in_a_path_with_a_space(make: Machine, tmp_path: Path, installed: bool) -> None:
    tools, given = tmp_path / "my tools", tmp_path / "given"
    tools.mkdir()
    python = f"""case "$2" in *version_info*) echo 3.12 ;; *ensurepip*) ;; pip) cp "{tools}/installer" .uv/bin/uv ;;
    venv) mkdir -p .uv/bin; cp "$0" .uv/bin/python ;; esac"""
    uv = f"""echo "$@" >> "{given}"; [ "$1" != venv ] || {{ mkdir -p .venv/bin; cp "$4" .venv/bin/python; }}"""
    for name, text in {"python3": python, "git": "exit 0", "uv" if installed else "installer": uv}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    made = make("env")
    assert made.returncode == 0, made.stderr
    checkout = tmp_path / "my checkout"
    assert (checkout / ".venv/.complete").is_file()
    assert (checkout / ".uv/bin/uv").is_file() is not installed
    words = [line.split()[:2] for line in given.read_text().splitlines()]
    assert words == [["venv", "--clear"], ["pip", "sync"], ["pip", "install"]]
    # Once.
    assert "uv" not in make("env").stdout
