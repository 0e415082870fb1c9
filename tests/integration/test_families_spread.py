"""Two processes have the gradients of one, of each kind of network: see ``spread.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path

from families import FAMILIES

JOBS = {
    "flux": "ddp",
    "sd": "ddp",
    # Lists of prompts, each as long as it is.
    "z_image": "ddp",
    "hunyuan_video": "fsdp",
    "cogvideox": "fsdp",
    # Half of it is not trained.
    "ltx2": "fsdp",
    # Called by a forward pass of vipo's own.
    "qwen_image_21": "fsdp",
    # The first process's sample needs one of its networks, the second's the other.
    "wan22_a14b": "ddp",
}


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    for name in JOBS:
        FAMILIES[name].write(tmp_path / name)
    jobs = [f"{name}:{strategy}" for name, strategy in JOBS.items()] + ["wan22_a14b:fsdp", "ltx2:ddp"]
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("spread.py")), str(tmp_path), *jobs],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = dict(json.loads(line) for line in ran.stdout.splitlines() if line.startswith("["))
    assert found.keys() == set(jobs)
    # As single samples of one process, averaged (vipo.conformance.checks.gradients).
    assert {job: value for job, value in found.items() if not value < 1e-4} == {}
