"""A small experiment as the other stages write it: five arms, eight runs, drawn pictures, hostile prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import load_file, save_file

from vipo.config.compose import dump_config, load_config, load_config_file
from vipo.demo.scenes import Scene, SceneObject, draw, object_mask
from vipo.reporting import build_data, build_report
from vipo.sampling.noise import keyed_seed

SEEDS: Mapping[str, Sequence[int]] = {"base": [0], "grpo": [0, 1], "product": [0, 1], "vipo": [0, 1], "inverted": [0]}
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quoted\" 'single' {{ 7 * 7 }}"
PROMPTS = [
    HOSTILE,
    "a large circle on a white background",
    "‮right to left‬ مربع كبير 🎨\nsecond line",
    "a triangle at the top on a mint background",
    "averylongwordwithoutanybreak" * 30,
    *(f"a small square on the left, number {number}" for number in range(5)),
]
#: Gain of (object_redness, scene_shape) at the end of training, by arm.
GAINS = {"grpo": (0.20, -0.12), "product": (0.17, -0.08), "vipo": (0.215, -0.05), "inverted": (0.01, -0.02)}
UPDATES, KEPT, SAMPLES = 24, (8, 16), 2


def build_experiment(
    root: Path, seeds: Mapping[str, Sequence[int]] = SEEDS, *, kept: bool = False
) -> tuple[Path, list[str]]:
    """Write ``root/results/demo``; returns its folder and runs. `kept`: with samples of all updates."""
    folder = root / "results" / "demo"
    runs = [f"{arm}-s{seed}" for arm, numbers in seeds.items() for seed in numbers]
    (folder / "prompts").mkdir(parents=True)
    for name in ("train", "eval"):
        rows = [json.dumps({"id": prompt_id(text), "prompt": text}) for text in PROMPTS]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    manifest = {"counts": {"kept": 2 * len(PROMPTS)}, "source": "data/<prompts>.jsonl"}
    (folder / "prompts" / "manifest.json").write_text(json.dumps(manifest))
    for arm, numbers in seeds.items():
        listed = ",".join(map(str, numbers))
        for seed in numbers:
            overrides = ["experiment=demo", f"arm={arm}", f"seed={seed}", f"experiment.arms.{arm}.seeds=[{listed}]"]
            overrides += ["evaluation.shown_prompts=5", "evaluation.bootstrap=200", f"training.updates={UPDATES}"]
            overrides += ["evaluation.steps=20"]
            overrides += [f"training.save_at={list(KEPT)}", "evaluation.rewards=[object_redness,redness,scene_shape]"]
            config = load_config(overrides)
            evaluation = folder / "evaluation" / config.run_name
            _write_evaluation(evaluation, arm, seed, kept)
            (evaluation / "config.yaml").write_text(dump_config(config))
            if arm != "base":
                _write_run(folder / "runs" / config.run_name, arm, seed)
    return folder, runs


def write_report(folder: Path, runs: Sequence[str], output: Path) -> Path:
    """The report's numbers and page of ``results/demo``; returns the page."""
    config = load_config_file(folder / "evaluation" / "base-s0" / "config.yaml")
    build_data(folder, runs, config, output / "data")
    return build_report(folder, runs, config, output)


def as_films(folder: Path, runs: Sequence[str]) -> None:
    """Turn the samples into clips of five pictures that move, with maps of two latent frames that move along."""
    for run in runs:
        for path in (folder / "samples" / run / "pictures").glob("*.png"):
            with Image.open(path) as picture:
                still = np.asarray(picture.convert("RGB"))
            frames = [Image.fromarray(np.roll(still, 4 * number, axis=1)) for number in range(5)]
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0)
        path = folder / "evaluation" / run / "maps.safetensors"
        maps = {name: np.stack([heat, np.roll(heat, 1, axis=1)]) for name, heat in load_file(path).items()}
        save_file(maps, path, metadata={"frame_groups": json.dumps([[0, 1], [1, 5]])})


def prompt_id(text: str) -> str:
    """A hexadecimal id."""
    return f"{keyed_seed('prompt', text):016x}"


def _random(*key: int | str) -> np.random.Generator:
    return np.random.default_rng(keyed_seed("report fixture", *key))


def _write_run(folder: Path, arm: str, seed: int) -> None:
    folder.mkdir(parents=True)
    rng = _random(arm, seed)
    metrics, timing = [], []
    for update in range(1, UPDATES + 1):
        done = update / UPDATES
        row = {
            "update": update,
            "loss": float(rng.normal(0, 1e-3)),
            "reward/mean": 0.2 + GAINS[arm][0] * done + float(rng.normal(0, 0.02)),
            "reward/std": 0.1,
            "reward/object_redness/mean": 0.2,
            "group/std": 0.08 + float(rng.normal(0, 0.005)),
            "group/zero_std_share": 0.0,
            "log_ratio/max_before_first_step": float(rng.choice([0.0, 2e-7, 5e-7])),
            "log_ratio/rms_before_first_step": 1e-8,
            "log_ratio/rms_sample": 2e-3,
            "log_ratio/rms_position": 3e-2,
            "clip/share": float(rng.uniform(0.2, 0.5)),
            "grad/norm": float(rng.lognormal(-1, 0.3)),
            "samples/invalid": 0.0,
            **{f"clip/share_t{step}": float(rng.uniform(0.1, 0.2) * (step + 1) / 3) for step in range(9)},
        }
        if arm != "grpo":
            row |= {
                "map/mean": 0.4 + float(rng.normal(0, 0.02)),
                "map/constant_share": 0.0,
                "map/entropy": 0.92 + float(rng.normal(0, 0.005)),
            }
        metrics.append(row)
        parts = {
            "rollout": 2.1,
            "learn": 3.4,
            "decode": 0.12,
            "reward": 0.02,
            "map": 0.15 * (arm != "grpo"),
            "other": 0.05,
        }
        parts = {f"time/{name}": value * float(rng.uniform(0.95, 1.1)) for name, value in parts.items()}
        timing.append({"update": update, **parts, "time/total": sum(parts.values()), "memory/peak_bytes": 1.6e9})
    for name, rows in (("metrics", metrics), ("timing", timing)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    record = {
        "stage": "train",
        "command": ["vipo", "train", "experiment=demo", f"arm={arm}", f"seed={seed}"],
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "package_sha256": "ab" * 32,
        "lock_sha256": "cd" * 32,
        "container_digest": None,
        "hardware": {"cpu": "Example CPU <2 cores>", "cores": 2, "memory_bytes": 8 * 2**30, "gpus": []},
        "versions": {"python": "3.11.2", "torch": "2.15.0", "diffusers": "0.42.1"},
        "started": "2025-01-01T00:00:00+00:00",
        "ended": "2025-01-01T00:02:20+00:00",
        "inputs": [{"path": "data/demo-generator", "bytes": 19_000_000, "sha256": "ef" * 32}],
        "outputs": [{"path": f"results/demo/runs/{arm}-s{seed}/weights", "bytes": 18_000_000, "sha256": "12" * 32}],
    }
    (folder / "provenance.json").write_text(json.dumps(record))


def _write_evaluation(folder: Path, arm: str, seed: int, kept: bool) -> None:
    pictures = folder.parents[1] / "samples" / folder.name / "pictures"
    for made in (folder, pictures):
        made.mkdir(parents=True)
    updates = [0] if arm == "base" else [*KEPT, UPDATES]
    rows, maps = [], {}
    for update in updates:
        share = update / UPDATES
        for text in PROMPTS:
            for sample in range(SAMPLES):
                base = _random("base", text, sample)
                own = _random(arm, seed, update, text, sample)
                gains = GAINS.get(arm, (0.0, 0.0))
                noise = share * own.normal(0, 0.06, 3)
                change = share * (0.0 if arm == "base" else 0.02 + 0.5 * gains[0])
                rows.append(
                    {
                        "run": f"{arm}-s{seed}",
                        "arm": arm,
                        "seed": seed,
                        "update": update,
                        "final": update == updates[-1],
                        "prompt_id": prompt_id(text),
                        "prompt": text,
                        "sample": sample,
                        "reward/object_redness": base.normal(0.2, 0.1) + share * gains[0] + noise[0],
                        "reward/redness": base.normal(0.0, 0.05) + share * gains[0] / 4 + noise[1] / 4,
                        "reward/scene_shape": base.normal(0.9, 0.02) + share * gains[1] + noise[2],
                        "change/total": change * (1 + share * own.normal(0, 0.1)),
                        "change/foreground": 2.2 * change * (1 + share * own.normal(0, 0.1)),
                        "change/background": 0.7 * change * (1 + share * own.normal(0, 0.1)),
                    }
                )
                name = f"u{update}-{prompt_id(text)}-{sample}"
                if sample == 0 and (kept or update == updates[-1]):
                    heat = _write_sample(pictures / f"{name}.png", text, share * gains[0])
                    if update == updates[-1]:
                        maps[name] = heat
    pd.DataFrame(rows).to_parquet(folder / "scores.parquet", index=False)
    save_file(maps, folder / "maps.safetensors")


def _write_sample(path: Path, text: str, redness: float) -> np.ndarray:
    rng = _random("picture", text)
    item = SceneObject(
        str(rng.choice(["circle", "square", "triangle"])), "blue", "large", "", *rng.uniform(-9, 9, 2), 14.0
    )
    image = draw(Scene((item,), str(rng.choice(["white", "gray", "mint"]))))
    mask = object_mask(item)
    red = np.array([0.9, 0.1, 0.1])[:, None, None]
    weight = mask * min(1.0, 4 * redness)
    image = image * (1 - weight) + red * weight
    Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(path)
    return mask.reshape(8, 8, 8, 8).mean(axis=(1, 3)).astype(np.float32)
