"""A small experiment with all its results, and the same with many prompts, for what is measured on results."""

import json
import shutil
from pathlib import Path

import pandas as pd
from safetensors.numpy import load_file, save_file

from vipo.config.compose import repository_root
from vipo.config.run import Config
from vipo.stages import (
    crate_stage,
    encode_stage,
    evaluate_stage,
    prepare_stage,
    report_stage,
    train_stage,
)


def finished_experiment(config: Config, results: Path) -> Path:
    """Every stage of an experiment of the base and one run; gives its folder."""
    root = repository_root()
    prepare_stage(config, root, results)
    encode_stage(config, root, results)
    train_stage(config, root, results)
    evaluate_stage(config.as_base(), root, results)
    evaluate_stage(config, root, results)
    report_stage(config, root, results)
    crate_stage(config, root, results)
    return results / config.experiment.name


def with_prompts(experiment: Path, count: int, results: Path) -> Path:
    """A copy of a finished experiment whose held-out prompts are repeated until there are `count`.

    Pictures are linked, so that each is a file of its own name; scores and maps are those of the repeated prompt.
    """
    folder = results / experiment.name
    shutil.copytree(experiment, folder, ignore=shutil.ignore_patterns("report", "crate", "pictures"))
    held_out = [json.loads(line) for line in (experiment / "prompts/eval.jsonl").read_text().splitlines()]
    shown = set(pd.read_parquet(next(experiment.glob("evaluation/*/scores.parquet")))["prompt_id"])
    held_out = [prompt for prompt in held_out if prompt["id"] in shown]
    copies = [
        {**prompt, "id": f"{number:016x}", "text": f"{prompt['text']}, number {number}"}
        for number, prompt in ((number, held_out[number % len(held_out)]) for number in range(count))
    ]
    origins = {copy["id"]: held_out[number % len(held_out)]["id"] for number, copy in enumerate(copies)}
    texts = {copy["id"]: copy["text"] for copy in copies}
    (folder / "prompts/eval.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in copies))
    for evaluation in sorted((folder / "evaluation").iterdir()):
        scores = pd.read_parquet(evaluation / "scores.parquet")
        by_prompt = dict(iter(scores.groupby("prompt_id")))
        rows = [by_prompt[old].assign(prompt_id=new, prompt=texts[new]) for new, old in origins.items()]
        pd.concat(rows, ignore_index=True).sort_values(["update", "prompt_id", "sample"]).to_parquet(
            evaluation / "scores.parquet", index=False
        )
        maps = load_file(evaluation / "maps.safetensors")
        pictures = experiment / "samples" / evaluation.name / "pictures"
        linked = folder / "samples" / evaluation.name / "pictures"
        linked.mkdir(parents=True)
        for new, old in origins.items():
            for picture in pictures.glob(f"u*-{old}-*.png"):
                (linked / picture.name.replace(old, new)).hardlink_to(picture)
        repeated = {name.replace(old, new): maps[name] for new, old in origins.items() for name in maps if old in name}
        save_file(repeated, evaluation / "maps.safetensors")
    return folder
