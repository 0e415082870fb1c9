"""Proves and measures vipo on one GPU in one go: ``benchmarks/gpu/run.sh`` calls it.

Every step is a process of its own with its own time limit. Whatever ends the run, SIGKILL too, ``gpu.json`` and
``gpu.md`` hold what was measured until a few seconds before; what was not says why.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import read_figures
from benchmarks.gpu.steps import BUDGET, STEPS, Step, figures_file, run_step
from benchmarks.gpu.supervise import UNDER_WAY, Running, side_by_side
from vipo.provenance.files import atomic_file
from vipo.runtime import settle_runtime

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "timm", "safetensors", "numpy")
_NOT_WRITTEN = {
    "CUDA graphs, FP8 rollouts": "not built, docs/performance.md says why",
    "decoding beside the next rollout": "not built, docs/performance.md says why",
}
# Seconds within which no step can tell anything.
_LEAST = 5


def machine_facts() -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    commit, why = _told_by("git", "rev-parse", "HEAD")
    # A copy without its repository is told its commit, as a container is.
    facts["commit"] = commit or os.environ.get("VIPO_GIT_COMMIT")
    if facts["commit"] is None:
        facts["commit_unknown"] = why
    gpus, why = _told_by("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    facts["gpus"] = gpus.splitlines() or why
    return facts


def _told_by(*command: str) -> tuple[str, str]:
    """What a program prints, and why nothing where it fails, hangs or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{command[0]}: {error}"
    return done.stdout.strip() if done.returncode == 0 else "", f"{command[0]}: {done.stderr.strip() or done.stdout}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(results: dict[str, Any]) -> str:
    """`results` for people: one line a figure."""
    machine = results["machine"]
    lines = [
        "# vipo on a GPU",
        "",
        f"{results['started']}, commit {machine['commit']}, device {results['device']}"
        + (", in miniature: no figure means anything" if results["tiny"] else ""),
        "",
        f"GPUs: {machine['gpus']}; {machine['cpus']} CPUs; Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "",
        "| step | figure | value |",
        "|---|---|---|",
    ]
    for name, step in results["steps"].items():
        seconds = "" if step["seconds"] is None else f", {step['seconds']} s"
        lines.append(f"| **{name}** | {step['question']} | {step['status']}{seconds} |")
        lines += [f"| {name} | {_cell(key)} | {_cell(value)} |" for key, value in step["figures"].items()]
    lines += ["", "Not run:", "", *(f"- {what}: {why}" for what, why in results["not_run"].items()), ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) and 0 < abs(value) < 0.01 else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def run(output: Path, work: Path, device: str, tiny: bool, budget: float, names: list[str]) -> dict[str, Any]:
    """All steps within `budget` seconds; writes ``gpu.json`` and ``gpu.md`` every few of them.

    Those that measure no time run beside each other, as far as there are cores for it; the others one after the other.

    Args:
        output: folder of the results; at the end ``logs.tar.gz`` too, which is `work`.
        work: folder of the steps' figures and logs.
    """
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    results: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "tiny": tiny,
        "machine": machine_facts(),
        "steps": {},
        "not_run": dict(_NOT_WRITTEN)
        | {step.name: "the whole ended before it" if step.name in names else "not asked for" for step in STEPS},
    }
    chosen = [step for step in STEPS if step.name in names]
    # Where the whole may take longer than it is to on a GPU, so may each step.
    patience = max(1.0, budget / BUDGET)

    def start(step: Step) -> Running | None:
        left = budget - (time.monotonic() - begun)
        if left < _LEAST:
            return None
        print(f"{step.name}: {step.question}", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu.gpu", str(work), "--step", step.name, "--device", device]
        return Running(step, [*command, *(["--tiny"] if tiny else [])], work, min(step.limit * patience, left))

    def write() -> None:
        results["seconds"] = round(time.monotonic() - begun, 1)
        for name, text in (("gpu.json", json.dumps(results, indent=1) + "\n"), ("gpu.md", table(results))):
            with atomic_file(output / name) as file:
                file.write_text(text, encoding="utf-8")

    # An earlier run's are replaced before anything is measured.
    write()
    try:
        for timed, group in itertools.groupby(chosen, key=lambda step: step.timed):
            for step, found in side_by_side(list(group), 1 if timed else _at_once(), start):
                if found is None:
                    results["not_run"][step.name] = f"the {budget:.0f} s of the whole were used up"
                else:
                    results["not_run"].pop(step.name, None)
                    results["steps"][step.name] = found
                    if found["status"] != UNDER_WAY:
                        print(f"{step.name}: {found['status']}, {found['seconds']} s", flush=True)
                write()
    except BaseException:
        # Ctrl-C or SIGTERM: steps that were under way have noted something since.
        for name, found in results["steps"].items():
            if found["status"] == UNDER_WAY:
                noted = read_figures(figures_file(work, name))
                results["steps"][name] = found | {"status": "stopped with the whole", "figures": noted}
        write()
        raise
    finally:
        shutil.make_archive(str(output / "logs"), "gztar", work)
    return results


def _at_once() -> int:
    # A step is one process most of the time, and three at most, of a thread each.
    return max(1, (os.cpu_count() or 1) * 2 // 3)


def main() -> None:
    """Exit status 1 if a step failed; a step that its limit ended counts as one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("results/gpu"), help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="in miniature, on any machine: does it still run?")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of the whole")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--step", choices=[step.name for step in STEPS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # As the command does, before anything is computed.
    settle_runtime()
    if arguments.step:
        run_step(arguments.step, arguments.output, arguments.device, arguments.tiny)
        return
    # So that no step outlives this process.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    names = arguments.only or [step.name for step in STEPS]
    with tempfile.TemporaryDirectory() as work:
        results = run(arguments.output, Path(work), arguments.device, arguments.tiny, arguments.budget, names)
    print((arguments.output / "gpu.md").read_text(encoding="utf-8"))
    sys.exit(int(any(step["status"] != "ok" for step in results["steps"].values())))


if __name__ == "__main__":
    main()
