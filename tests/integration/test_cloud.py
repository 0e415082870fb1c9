"""The Kubernetes manifest against schema, command line and image; the commands of docs/cloud.md and docs/cluster.md."""

import json
import os
import re
import shlex
import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from vipo.cli import app
from vipo.config.compose import load_config, repository_root

ROOT = repository_root()
CLAIM, JOB = yaml.safe_load_all((ROOT / "containers/kubernetes/job.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in [*POD["initContainers"], *POD["containers"]]}


# podFailurePolicy is stable from the first one.
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_the_schema_admits_it_and_no_misspelt_key(version: str) -> None:
    for document in (CLAIM, JOB):
        kubernetes_validate.validate(document, version, strict=True)
    misspelt = JOB | {"spec": JOB["spec"] | {"template": {"spec": POD | {"restartPolcy": "Never"}}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolcy"):
        kubernetes_validate.validate(misspelt, version, strict=True)


def _parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    group = typer.main.get_command(app)
    with group.make_context("vipo", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))  # type: ignore[attr-defined]
    with command.make_context(name, rest) as parsed:
        return str(name), dict(parsed.params)


def test_the_command_line_takes_its_arguments() -> None:
    configs = {}
    for name, step in STEPS.items():
        command, parameters = _parsed(step["args"])
        assert command == name
        if name == "upload":
            assert str(parameters["folder"]) == f"results/{configs['train'].experiment.name}"
            assert parameters["url"].startswith("s3://")
        else:
            configs[name] = load_config(parameters["overrides"])
    assert list(STEPS) == ["train", "evaluate", "upload"]
    assert configs["train"] == configs["evaluate"]
    assert configs["train"].run_name in JOB["metadata"]["name"]
    training, processes = configs["train"].training, configs["train"].distribution.processes
    # A process takes one.
    for name in configs:
        assert STEPS[name]["resources"]["limits"]["nvidia.com/gpu"] == processes == 8, name
    samples = training.prompts_per_update * training.group_size // training.optimizer_steps_per_update
    assert samples // training.micro_batch % processes == 0


def test_what_was_preempted_goes_on_and_a_wrong_command_does_not() -> None:
    assert POD["restartPolicy"] == "Never"
    rules = JOB["spec"]["podFailurePolicy"]["rules"]
    exits = {
        value: rule["action"] for rule in rules if "onExitCodes" in rule for value in rule["onExitCodes"]["values"]
    }
    assert exits == {os.EX_TEMPFAIL: "Ignore", 2: "FailJob"}
    conditions = [rule for rule in rules if "onPodConditions" in rule]
    assert [(rule["action"], rule["onPodConditions"][0]["type"]) for rule in conditions] == [
        ("Ignore", "DisruptionTarget")
    ]
    assert POD["terminationGracePeriodSeconds"] >= 60
    # A lock that the pod before still holds, on another node, is waited for: an exit with 1 would count.
    (seconds,) = re.findall(r"VIPO_WAIT=(\d+)", (ROOT / "workflow/rules/common.smk").read_text())
    for step in STEPS.values():
        assert {"name": "VIPO_WAIT", "value": seconds} in step["env"]


def test_it_fits_the_image() -> None:
    recipe = (ROOT / "containers/Dockerfile").read_text()
    user, group = re.findall(r"^USER (\d+):(\d+)$", recipe, re.MULTILINE)[0]
    security = POD["securityContext"]
    assert security["runAsNonRoot"]
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (int(user), int(group), int(group))
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert volumes["work"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    for step in STEPS.values():
        # Only a reference by digest says what runs, and provenance records that very digest.
        digest = {item["name"]: item.get("value") for item in step["env"]}["VIPO_IMAGE_DIGEST"]
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
        assert step["image"].endswith(f"/vipo@{digest}")
        mounts = {mount["mountPath"]: mount["name"] for mount in step["volumeMounts"]}
        assert mounts["/vipo/results"] == "work"
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert set(mounts.values()) <= volumes.keys()
        assert step["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip


def test_the_commands_of_the_page_exist() -> None:
    page = (ROOT / "docs/cloud.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    commands = re.findall(r"\bvipo ((?:train|upload) [^;&\n#]+)", blocks)
    assert len(commands) >= 4
    for command in commands:
        parameters = _parsed(shlex.split(command))[1]
        if "overrides" in parameters:
            load_config(parameters["overrides"])
    (overrides,) = re.findall(r"'overrides=(\[.*?\])'", blocks)
    load_config(["experiment=demo", *json.loads(overrides)])
    for target in re.findall(r"\]\(([\w./-]+)\)", page):
        assert (ROOT / "docs" / target).is_file(), target
    assert set(re.findall(r"^make (\w+)", blocks, re.MULTILINE)) == {"image", "sif"}
    # Root would own the folder that Docker makes.
    assert not [line for line in blocks.splitlines() if line.startswith("docker run")]
    assert blocks.count("mkdir -p results") == 2


def test_apptainer_sees_the_hub_s_cache() -> None:
    """The image says that caches are elsewhere; what is bound takes the place of the profile's own arguments."""
    (block,) = re.findall(r"```bash\n(export HF_HOME=.*?)```", (ROOT / "docs/cloud.md").read_text(), re.DOTALL)
    home, line = block.splitlines()
    arguments = shlex.split(line)
    given = arguments[arguments.index("--apptainer-args") + 1].split()
    for profile in ("local", "slurm"):
        own = yaml.safe_load((ROOT / "workflow/profiles" / profile / "config.yaml").read_text())["apptainer-args"]
        assert given[0] == own
    assert given[1] == "--bind"
    assert Path(home.partition("=")[2]).is_relative_to(given[2])
    assert "XDG_CACHE_HOME=/tmp" in (ROOT / "containers/Dockerfile").read_text()


def test_the_commands_of_the_cluster_page_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snakemake.cli import parse_args

    page = (ROOT / "docs/cluster.md").read_text()
    # An experiment that the page leaves open, and no overrides where it leaves those.
    blocks = "".join(re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)).replace("=NAME", "=demo")
    lines = blocks.replace(" overrides=…", "").splitlines()
    commands = [shlex.split(line.split(" | ")[0], comments=True) for line in lines]
    for name in ("configs", "workflow/profiles"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("local", "slurm"):
        shutil.copy(ROOT / name, tmp_path / name, follow_symlinks=False)
    monkeypatch.chdir(tmp_path)
    told = dict.fromkeys(("cp", "vipo", "snakemake"), 0)
    for name, *arguments in commands:
        if name == "cp":
            shutil.copy(*arguments)
        elif name == "vipo":
            load_config(_parsed(arguments)[1]["overrides"])
        elif name == "snakemake":
            parsed = parse_args(arguments)[1]
            experiment, *overrides = parsed.config
            values = yaml.safe_load(overrides[0].removeprefix("overrides=")) if overrides else []
            config = load_config([experiment, *values])
            assert config.distribution.processes == (8 if "distribution.processes=8" in values else 1)
            assert parsed.executor == ("slurm" if parsed.profile == ["slurm"] else None)
        else:
            assert name in {"git", "make", "source", "sinfo", "export"}
            continue
        told[name] += 1
    assert told == {"cp": 1, "vipo": 2, "snakemake": 7}

    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", page, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for target in re.findall(r"\]\(([\w./-]+)\)", page):
        assert (ROOT / "docs" / target).is_file(), target
    for path in re.findall(r"`((?:workflow|configs)/[\w./]+)`", page):
        assert (ROOT / path).exists(), path
    # The keys that the page explains, for a stage that has them all.
    keys = set(re.findall(r"`((?:cluster|distribution|training)\.[a-z_A-Z.]+)`", page))
    assert len(keys) >= 8
    for key in keys:
        reduce(getattr, key.replace("STAGE", "train").split("."), load_config(["experiment=demo"]))
