"""A small real experiment in a git repository of its own, its anchors, and a tamperer who recomputes hashes."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock
from urllib.parse import unquote

import yaml

from vipo.config.compose import dump_config, load_config, repository_root, write_if_changed

if TYPE_CHECKING:
    from vipo.audit import Audit

RUNS = ("base-s0", "grpo-s0", "vipo-s0")
EXPERIMENT = "results/demo"
_SETTINGS = {
    "generator": {"path": "data/generator"},
    "sampling": {"steps": 3},
    "training": {
        "updates": 2,
        "prompts_per_update": 2,
        "group_size": 4,
        "optimizer_steps_per_update": 2,
        "micro_batch": 4,
        "trained_transitions": 2,
        "checkpoint_every": 1,
        "save_at": [1],
    },
    "evaluation": {"prompts": 3, "samples_per_prompt": 1, "steps": 3, "bootstrap": 100, "shown_prompts": 1},
}


def git(root: Path, *arguments: str) -> str:
    """A git command in `root`; what it prints."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def inside(root: Path) -> Iterator[None]:
    """The block as if in the checkout `root`: vipo takes configurations from there, and its code is recorded as its."""
    before = Path.cwd()
    os.chdir(root)
    code = root if (root / ".git").exists() else None
    try:
        with mock.patch("vipo.provenance.environment.code_folder", return_value=code):
            yield
    finally:
        os.chdir(before)


def build_project(root: Path, generator: Path) -> Path:
    """A checkout with a finished experiment of three runs; committed, but for the results, which git ignores."""
    source = repository_root()
    for name in ("configs", "workflow", "data/prompts"):
        shutil.copytree(source / name, root / name)
    for name in ("Snakefile", "requirements.lock", "CITATION.cff"):
        shutil.copy(source / name, root / name)
    shutil.copytree(generator, root / "data" / "generator")
    (root / ".gitignore").write_text("results/\n")
    demo = root / "configs" / "experiment" / "demo.yaml"
    text = demo.read_text()
    head, _, _ = text.partition("  arms:\n")
    demo.write_text(f"{head}  arms: {{base: {{}}, grpo: {{}}, vipo: {{}}}}\n{yaml.safe_dump(_SETTINGS)}")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "code")
    with inside(root):
        _run(root)
    return root / EXPERIMENT


def _run(root: Path) -> None:
    from vipo.stages import encode_stage, evaluate_stage, prepare_stage, report_stage, summarize_stage, train_stage

    configs = {run: load_config(["experiment=demo", f"arm={run.removesuffix('-s0')}", "seed=0"]) for run in RUNS}
    experiment, results, first = root / EXPERIMENT, root / "results", configs["base-s0"]
    for run, config in configs.items():
        write_if_changed(experiment / "configs" / f"{run}.yaml", dump_config(config))
    prepare_stage(first, root, results)
    encode_stage(first, root, results)
    for run, config in configs.items():
        if run != "base-s0":
            train_stage(config, root, results)
        evaluate_stage(config, root, results)
    summarize_stage(first, root, results)
    report_stage(first, root, results)
    (experiment / "logs").mkdir()
    for name in ("prepare", "encode", *(f"train-{run}" for run in RUNS[1:]), "report"):
        (experiment / "logs" / f"{name}.log").write_text(f"INFO {name}\n")


def audited(root: Path, signers: Path | None = None, rerun: str | None = None) -> "Audit":
    """The audit of a project's experiment, as `vipo audit results/demo` makes it there."""
    from vipo.audit import audit_experiment

    with inside(root):
        return audit_experiment(Path(EXPERIMENT), root, allowed_signers=signers, rerun=rerun)


def new_key(folder: Path, principal: str) -> tuple[Path, Path]:
    """A fresh SSH key, and the file that allows it to sign as `principal`."""
    key = folder / f"{principal}.key"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", principal, "-f", str(key)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    signers = folder / f"{principal}.signers"
    signers.write_text(f"{principal} {key.with_suffix('.key.pub').read_text()}")
    return key, signers


# ---- dvc.lock, computed without vipo's own reader of it -----------------------------------------------------------


def md5(path: Path) -> dict[str, Any]:
    """What DVC 3 writes for a file or folder."""
    if path.is_file():
        content = path.read_bytes()
        return {"hash": "md5", "md5": hashlib.md5(content).hexdigest(), "size": len(content)}
    files = sorted(
        (file for file in path.rglob("*") if file.is_file()), key=lambda file: file.relative_to(path).as_posix()
    )
    rows = ", ".join(
        f'{{"md5": "{hashlib.md5(file.read_bytes()).hexdigest()}", "relpath": "{file.relative_to(path).as_posix()}"}}'
        for file in files
    )
    digest = hashlib.md5(f"[{rows}]".encode()).hexdigest()
    return {"hash": "md5", "md5": f"{digest}.dir", "size": sum(f.stat().st_size for f in files), "nfiles": len(files)}


def write_lock(root: Path) -> None:
    """``dvc.lock`` of the experiment as it is."""
    prompts, embeddings = (
        [f"{EXPERIMENT}/prompts/{name}" for name in ("eval.jsonl", "manifest.json", "train.jsonl")],
        [f"{EXPERIMENT}/embeddings/{name}.safetensors" for name in ("eval", "train")],
    )
    stages: dict[str, tuple[str, list[str], list[str]]] = {
        "prepare": ("vipo prepare experiment=demo arm=base", ["data/prompts/colourless.jsonl"], prompts),
        "encode": ("vipo encode experiment=demo arm=base", ["data/generator", *prompts[:1], *prompts[2:]], embeddings),
    }
    scores = []
    for run in RUNS:
        arm, trained, evaluated = run.removesuffix("-s0"), f"{EXPERIMENT}/runs/{run}", f"{EXPERIMENT}/evaluation/{run}"
        weights = []
        if arm != "base":
            weights = [f"{trained}/updates", f"{trained}/weights"]
            outs = [f"{trained}/config.yaml", f"{trained}/metrics.jsonl", *weights]
            deps = ["data/generator", embeddings[1], prompts[2]]
            stages[f"train-{run}"] = (f"vipo train experiment=demo arm={arm} seed=0", deps, outs)
        drawn = {run: [f"{EXPERIMENT}/samples/{run}/{name}" for name in ("pictures", "samples.json")] for run in RUNS}
        deps = ["data/generator", embeddings[0], prompts[0], *weights]
        stages[f"sample-{run}"] = (f"vipo evaluate --only sample experiment=demo arm={arm} seed=0", deps, drawn[run])
        names = ("config.yaml", "maps.safetensors", "scores.parquet", "summary.json")
        outs = [f"{evaluated}/{name}" for name in names if (root / evaluated / name).exists()]
        deps = [prompts[0], *dict.fromkeys([*drawn[run], *drawn["base-s0"]])]
        stages[f"score-{run}"] = (f"vipo evaluate --only score experiment=demo arm={arm} seed=0", deps, outs)
        scores.append(f"{evaluated}/scores.parquet")
    data = f"{EXPERIMENT}/report/data"
    outs = [f"{data}/{name}" for name in ("figures", "report.json", "tables")]
    stages["summarize"] = ("vipo summarize experiment=demo arm=base", [prompts[1], *scores], outs)
    lock = {
        "schema": "2.0",
        "stages": {
            name: {
                "cmd": command,
                **{
                    kind: [{"path": path, **md5(root / path)} for path in paths]
                    for kind, paths in (("deps", deps), ("outs", outs))
                },
            }
            for name, (command, deps, outs) in stages.items()
        },
    }
    (root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


# ---- the tamperer --------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recompute_hashes(root: Path, *, crate: bool = False) -> None:
    """Make every hash beside the results that of the files as they are now; with `crate`, the crate's as well."""
    experiment = root / EXPERIMENT
    for path in experiment.glob("runs/*/checkpoints/*/manifest.json"):
        _rewrite(path, lambda _, path=path: {file.name: sha256(file) for file in path.parent.iterdir() if file != path})
    _rewrite(experiment / "prompts" / "manifest.json", lambda content: _recounted(content, experiment / "prompts"))
    # Twice: a record may be another's input.
    for _ in range(2):
        for path in sorted(experiment.rglob("provenance.json")):
            _rewrite(path, lambda record, path=path: _rehashed(root, path, record))
    if crate:
        _rewrite(experiment / "ro-crate-metadata.json", lambda content: _described_anew(content, experiment))


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a JSON file, unless it is no JSON or has nothing to change."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    after = change(copy.deepcopy(before))
    if after != before:
        path.write_text(json.dumps(after, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _recounted(manifest: dict[str, Any], prompts: Path) -> dict[str, Any]:
    for name in ("train", "eval"):
        path = prompts / f"{name}.jsonl"
        manifest["files"][path.name] = sha256(path)
        manifest["counts"][name] = len(path.read_text().splitlines())
    return manifest


def _rehashed(root: Path, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Inputs as they are; outputs as well, those that are gone dropped and those that came added."""
    for entry in record["inputs"]:
        if (root / entry["path"]).is_file():
            entry |= _described(root / entry["path"])
    known = [entry["path"] for entry in record["outputs"]]
    folders = {(root / name).parent for name in known} | {path.parent}
    found = [file.relative_to(root).as_posix() for folder in sorted(folders) for file in sorted(folder.glob("*"))]
    added = [name for name in found if name not in known and Path(name).name not in _BESIDE]
    names = [name for name in [*known, *added] if (root / name).is_file()]
    record["outputs"] = [{"path": name, **_described(root / name)} for name in names]
    return record


def _described_anew(crate: dict[str, Any], experiment: Path) -> dict[str, Any]:
    for entity in crate["@graph"]:
        path = experiment / unquote(entity["@id"])
        if "File" in entity["@type"] and path.is_file():
            entity |= {"sha256": sha256(path), "contentSize": str(path.stat().st_size)}
    return crate


_BESIDE = ("provenance.json", "provenance.diff", "timing.jsonl", "time.json", "time.csv", "time.svg", ".lock")


def _described(path: Path) -> Mapping[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
