"""`snakemake --sdm apptainer` runs stages in the image and records which one.

Against a stand-in (tests/stand_ins/apptainer), for Debian 12 has no Apptainer: the command line is real, the container
is not.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from nursery import Nurseries

from vipo.config.compose import repository_root
from vipo.provenance import read_provenance

ROOT = repository_root()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name in ("configs", "workflow", "data/prompts"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Snakefile", "requirements.lock", "CITATION.cff"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "containers").mkdir()
    return folder


def _snakemake(project: Path, overrides: list[str], forks: Nurseries) -> subprocess.CompletedProcess[str]:
    programs = forks.need("vipo", "snakemake")
    tools = f"{ROOT / 'tests' / 'stand_ins'}:{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    log = str(project / "apptainer.jsonl")
    environment = os.environ | {"PATH": tools, "OMP_NUM_THREADS": "1", "APPTAINER_STAND_IN_LOG": log}
    command = ["snakemake", "--profile", "workflow/profiles/local", "--sdm", "apptainer"]
    command += ["--config", "experiment=demo", f"overrides={json.dumps(overrides)}"]
    return subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True)


def test_every_stage_runs_in_the_image_and_records_its_digest(
    project: Path, tiny_overrides: list[str], measured_parts: list[str], forks: Nurseries
) -> None:
    overrides = [text for text in tiny_overrides if not text.startswith("experiment=")]
    overrides += ["~experiment.arms.vipo", "~experiment.arms.product", "~experiment.arms.inverted"]
    overrides += ["experiment.arms.grpo.seeds=[0]", "training.updates=1", "training.save_at=[]", *measured_parts]
    refused = _snakemake(project, overrides, forks)
    assert refused.returncode != 0
    assert "containers/vipo.sif: is missing; `make sif` builds it" in refused.stdout + refused.stderr

    (project / "containers/vipo.sif").write_bytes(b"an image")
    finished = _snakemake(project, overrides, forks)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    calls = [json.loads(line) for line in (project / "apptainer.jsonl").read_text().splitlines()]
    stages = []
    for command in calls:
        assert command[:3] == ["exec", "--home", str(project)]
        assert "--nv" in command
        assert command[-4:-1] == ["containers/vipo.sif", "bash", "-c"]
        stages += re.findall(r"\bvipo (?:evaluate .*--only )?(\w+) ", command[-1])
    once = ("compare", "crate", "credit", "encode", "prepare", "report", "summarize", "train")
    # Of two runs, two shares each and what puts them together.
    assert sorted(stages) == sorted([*once, *("sample", "score") * 6])
    digest = "sha256:" + hashlib.sha256(b"an image").hexdigest()
    records = [read_provenance(path) for path in sorted((project / "results/demo").glob("**/provenance.json"))]
    assert {record["stage"] for record in records} == set(stages) - {"crate"}
    assert {record["container_digest"] for record in records} == {digest}
    assert {record["container_file"] for record in records} == {"containers/vipo.sif"}
    scores = pd.read_parquet(project / "results/demo/evaluation/grpo-s0/scores.parquet")
    assert scores["reward/served"].notna().all()
    assert any("served" in record.get("reward_processes", {}) for record in records)
    assert "tiny v1 (" in (project / "results/demo/comparison/metrics.csv").read_text()
