"""The tutorial, followed from its page; at two updates, on fewer prompts."""

import os
import sys
from pathlib import Path

import pandas as pd
from nursery import Nurseries

from workflow.tutorial import checkout, follow

SMALLER = {
    "updates: 20": "updates: 2",
    "save_at: [10]": "save_at: [1]",
    "prompts: 12": "prompts: 2",
    "steps: 12": "steps: 2",
}


def test_the_tutorial_is_followed(tmp_path: Path, forks: Nurseries) -> None:
    folder = tmp_path / "vipo"
    checkout(folder)
    path = f"{forks.need('vipo', 'snakemake')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    follow(folder, SMALLER, os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"})
    results = folder / "results" / "mine"
    scores = pd.read_parquet(results / "evaluation" / "vipo-s0" / "scores.parquet")
    assert {"reward/warmth", "reward/brightness"} <= set(scores)
    assert (results / "report" / "index.html").is_file()
    assert (folder / "mine" / "triangle.png").is_file()
    assert any((folder / "mine" / "export").rglob("*.safetensors"))
