"""The image recipe holds what it promises, its parts agree, and the build takes the committed files; none is built."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from vipo.config.compose import repository_root

ROOT = repository_root()
RECIPE = (ROOT / "containers/Dockerfile").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
# Comments out, continuation lines joined.
STEPS = [
    tuple(step.split(maxsplit=1))
    for step in re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", RECIPE, flags=re.MULTILINE)).splitlines()
    if step.strip()
]


def _all(instruction: str) -> list[str]:
    return [rest for name, rest in STEPS if name == instruction]


def test_base_is_pinned_and_a_local_one_may_take_its_place() -> None:
    assert STEPS[0][0] == "ARG"
    assert re.fullmatch(r"BASE=\S+@sha256:[0-9a-f]{64}", STEPS[0][1])
    assert _all("FROM") == ["${BASE}"]


def test_every_package_is_checked_against_a_hash() -> None:
    commands = " ".join(_all("RUN"))
    installs = re.findall(r"[^;&]*\b(?:pip install|pip sync|pip3 install)\b[^;]*", commands)
    assert len(installs) == 2
    assert all("--require-hashes" in command for command in installs)
    # Source distributions are built with what the lock names.
    assert "--build-constraints /run/lock/requirements.lock /run/lock/requirements.lock" in installs[1]
    assert not _all("ADD")
    assert not re.search(r"\b(curl|wget)\b|git clone", commands)
    for lock in ("requirements.lock", "containers/installer.lock"):
        assert f"source={lock},target=/run/lock/{Path(lock).name}" in commands
        requirements = re.sub(r"\\\n", " ", (ROOT / lock).read_text()).splitlines()
        assert requirements
        assert all("==" in line and "--hash=sha256:" in line for line in requirements)
    assert "--output-file containers/installer.lock" in MAKEFILE


def test_transformers_with_zeros_for_tied_embeddings_is_not_allowed() -> None:
    """As 5.0 may have them; 5.17, which machines with GPUs have, is."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [need for need in needs if need.startswith("transformers")] == ["transformers>=5.17"]
    locked = re.search(r"^transformers==(\d+)\.(\d+)\.", (ROOT / "requirements.lock").read_text(), re.M)
    assert locked is not None
    assert tuple(map(int, locked.groups())) >= (5, 17)


def test_what_triton_builds_with_is_there() -> None:
    (install,) = [command for command in _all("RUN") if "apt-get install" in command]
    assert {"gcc", "libc6-dev", "libpython3-dev"} <= set(install.split())


def test_no_cache_stays_in_a_layer() -> None:
    for command in _all("RUN"):
        if "apt-get install" in command:
            assert "rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*" in command
            assert "--no-install-recommends" in command
        if "pip install" in command:
            assert "--no-cache-dir" in command
            assert "--mount=type=cache,target=/var/cache/uv" in command
            assert "UV_CACHE_DIR=/var/cache/uv" in command


def test_user_gpu_labels_and_entry_point() -> None:
    assert _all("USER") == ["1000:1000"]
    environment = " ".join(_all("ENV"))
    for setting in (
        "NVIDIA_VISIBLE_DEVICES=all",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "VIPO_GIT_COMMIT=${GIT_COMMIT}",
    ):
        assert setting in environment
    (labels,) = _all("LABEL")
    assert "org.opencontainers.image.revision=${GIT_COMMIT}" in labels
    assert _all("ENTRYPOINT") == ['["tini", "--", "vipo"]']
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["vipo"].split(":")
    assert rf"from {module} import {function}\n\n{function}()" in RECIPE
    assert f"org.opencontainers.image.licenses={project['license']}" in labels


def test_apptainer_converts_the_same_image_to_the_file_that_the_workflow_reads() -> None:
    definition = (ROOT / "containers/vipo.def").read_text()
    assert re.findall(r"^(Bootstrap|From): (.+)$", definition, re.MULTILINE) == [
        ("Bootstrap", "oci-archive"), ("From", "containers/vipo.tar")
    ]  # fmt: skip
    (image,) = re.findall(r'^IMAGE = "(.+)"$', (ROOT / "Snakefile").read_text(), re.MULTILINE)
    assert "containers/build.sh vipo containers/vipo.tar" in MAKEFILE
    assert f"apptainer build --force {image} containers/vipo.def" in MAKEFILE
    assert {image, "containers/vipo.tar"} <= set((ROOT / ".gitignore").read_text().splitlines())


def test_the_image_is_tested_with_the_tests_of_make_unit() -> None:
    (unit,) = re.findall(r"^unit: env\n\tpytest .*-m ('[^']+')", MAKEFILE, re.MULTILINE)
    assert f"-m {unit}" in (ROOT / "containers/test.sh").read_text()


def test_two_empty_results_are_not_the_same_bytes(tmp_path: Path) -> None:
    script = (ROOT / "containers/test.sh").read_text()
    (compare,) = re.findall(r"^deterministic\(\) \{.*? are the same bytes\"$", script, re.MULTILINE | re.DOTALL)

    def compared() -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euo", "pipefail", "-c", f"work={tmp_path}; {compare}"]
        return subprocess.run(command, text=True, capture_output=True)

    runs = [tmp_path / results / "demo" / "runs" for results in ("results", "here/results")]
    for folder in runs:
        for name in ("prompts", "embeddings", "runs", "samples", "evaluation"):
            (folder.parent / name).mkdir(parents=True)
    assert compared().returncode != 0
    for folder in runs:
        (folder / "metrics.jsonl").write_text("{}")
    assert compared().stdout == "1 files are the same bytes\n"
    (runs[0] / "metrics.jsonl").write_text("{ }")
    assert compared().returncode != 0


_BUILDER = """#!/bin/sh
printf '%s\\n' "$@" >> "$LOG"
for last; do :; done
if [ "$1" = build ]; then
  cd "$last"
  find . -type f | sort > "$LOG.files"
  cat code.py > "$LOG.content"
fi
if [ "$1" = inspect ] || [ "$2" = inspect ]; then echo sha256:abc; fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit, and beside it a changed file and an untracked one."""
    root = tmp_path / "checkout"
    (root / "containers").mkdir(parents=True)
    script = root / "containers" / "build.sh"
    script.write_text((ROOT / "containers/build.sh").read_text())
    script.chmod(0o755)
    (root / "code.py").write_text("committed\n")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "code.py").write_text("changed\n")
    (root / "secret.txt").write_text("untracked\n")
    return root


def _build(checkout: Path, builders: list[str], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    tools = checkout.parent / "tools"
    tools.mkdir(exist_ok=True)
    for builder in builders:
        (tools / builder).write_text(_BUILDER)
        (tools / builder).chmod(0o755)
    # Installed here or not: only the stand-ins count.
    for builder in {"docker", "podman", "buildah"} - set(builders):
        (tools / builder).write_text("#!/bin/sh\nexit 1\n")
        (tools / builder).chmod(0o755)
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"BUILDER", "BASE", "SSL_CERT_FILE", "BUILD_ARGS"}
    }
    environment = kept | {"PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(log)} | variables
    command = [str(checkout / "containers/build.sh"), *arguments]
    return subprocess.run(command, cwd=checkout.parent, env=environment, text=True, capture_output=True)


@pytest.mark.parametrize("builder", ["docker", "podman", "buildah"])
def test_the_build_takes_the_commit_and_nothing_else(checkout: Path, builder: str) -> None:
    certificates = str(checkout / "ca.pem")
    archive = "containers/vipo.tar"
    done = _build(checkout, [builder], "vipo", archive, BASE="localhost/base", SSL_CERT_FILE=certificates)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "sha256:abc"
    assert "uncommitted changes are not in the image" in done.stderr
    log = checkout.parent / "log"
    assert log.with_name("log.files").read_text().split() == ["./code.py", "./containers/build.sh"]
    assert "committed" in log.with_name("log.content").read_text()
    arguments = log.read_text().splitlines()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    for argument in (f"GIT_COMMIT={commit}", "SOURCE_DATE_EPOCH=0", "BASE=localhost/base", f"id=ca,src={certificates}"):
        assert argument in arguments
    assert archive in arguments[-2:] or f"oci-archive:{archive}" in arguments[-2:]
    # The context is gone.
    assert not Path(arguments[arguments.index("build") + 2]).exists()


def test_without_extras_and_without_a_builder(checkout: Path) -> None:
    assert _build(checkout, ["podman", "buildah"], "vipo").returncode == 0
    text = (checkout.parent / "log").read_text()
    assert "--secret" not in text
    assert "BASE=" not in text
    assert "save" not in text.splitlines()
    none = _build(checkout, [], "vipo")
    assert none.returncode == 1
    assert none.stderr.startswith("error: no working docker, podman or buildah here")
    assert "no working docker here" in _build(checkout, ["podman"], "vipo", BUILDER="docker").stderr
