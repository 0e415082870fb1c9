"""Video through every stage: prompts, embeddings, training that survives a kill, evaluation, report."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import av
import pandas as pd
import pytest
import torch
from nursery import Nurseries
from PIL import Image
from safetensors import safe_open
from tiny import OTHER_FAMILY

from vipo.config.compose import load_config, repository_root
from vipo.stages import encode_stage, evaluate_stage, prepare_stage, report_stage, train_stage

ROOT = repository_root()
PROMPTS = [
    "a fox runs",
    "an owl turns",
    "a hen eats",
    "a bee lands",
    "an elk jumps",
    "a cat naps",
    "a dog digs",
    "rain",
]


@pytest.fixture
def overrides(tiny_wan: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return [
        *OTHER_FAMILY,
        *(f"~experiment.arms.{arm}" for arm in ("grpo", "product", "inverted")),
        "experiment.arms.vipo.seeds=[0]",
        "generator=wan",
        f"generator.path={tiny_wan}",
        "generator.frames=9",
        "generator.max_sequence_length=8",
        f"prompts.source={tmp_path / 'prompts.txt'}",
        "optimizer.learning_rate=1e-3",
        "training.updates=3",
        "training.group_size=4",
        "training.micro_batch=4",
        "training.checkpoint_every=1",
        "evaluation.steps=4",
        "evaluation.batch=3",
    ]


def _artifacts(run: Path) -> dict[str, bytes]:
    files = [run / "metrics.jsonl", run / "config.yaml", *run.glob("weights/**/*.*")]
    assert len(files) == 4
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_video_experiment_from_prompts_to_report(overrides: list[str], tmp_path: Path, forks: Nurseries) -> None:
    results, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    config, base = (load_config([*overrides, f"arm={arm}"]) for arm in ("vipo", "base"))
    prepare_stage(config, ROOT, results)
    encode_stage(config, ROOT, results)
    shutil.copytree(results, disturbed)
    train_stage(config, ROOT, results)

    script = ROOT / "tests" / "e2e" / "kill_and_resume.py"
    jobs = json.dumps([[str(disturbed), [[1, 0.05], None]]])
    status, out, err = forks.run(script, jobs, *overrides, "arm=vipo", cwd=ROOT)
    assert status == 0, err
    killed, finished = out.splitlines()
    assert killed.split()[0] == "killed"
    assert finished == "finished 0 3"
    run = "demo/runs/vipo-s0"
    assert _artifacts(results / run) == _artifacts(disturbed / run)

    metrics = [json.loads(line) for line in (results / run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["map/constant_share"] < 1 and row["grad/norm"] > 0 for row in metrics)
    assert all(row["group/zero_std_share"] == 0 for row in metrics)

    for each in (base, config):
        evaluate_stage(each, ROOT, results)
    folder = results / "demo" / "evaluation" / "vipo-s0"
    scores = pd.read_parquet(folder / "scores.parquet")
    assert len(scores) == 4
    assert (scores["change/total"] > 0).all()
    assert not any(name.startswith("change/fore") for name in scores)
    for path in (results / "demo" / "samples" / "vipo-s0" / "pictures").iterdir():
        with Image.open(path) as file:
            assert (file.n_frames, file.size) == (9, (48, 32))
    with safe_open(folder / "maps.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["frame_groups"]) == [[0, 1], [1, 5], [5, 9]]
        maps = torch.stack([file.get_tensor(name) for name in sorted(file.keys())])
    assert maps.shape == (4, 3, 4, 6)
    assert float(maps.std()) > 0

    page = report_stage(config, ROOT, results).read_text(encoding="utf-8")
    films = dict(re.findall(r'<video class="(plain|mapped)" src="data:video/webm;base64,([^"]+)"', page))
    assert films.keys() == {"plain", "mapped"}
    for text in films.values():
        with av.open(io.BytesIO(base64.b64decode(text))) as film:
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        # Every frame, enlarged by whole pixels.
        assert [frame.shape for frame in frames] == [(3 * 32, 3 * 48, 3)] * 9
