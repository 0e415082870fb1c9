"""Proves and measures vipo on one GPU in one go: ``benchmarks/gpu/run.sh`` calls it.

Every step is a process of its own with its own time limit, and every figure is on disk as soon as it is known. Whatever
ends the run, ``gpu.json`` and ``gpu.md`` hold what was measured until then; what was not says why.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Record, read_figures

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "timm", "safetensors", "numpy")
_NOT_WRITTEN = {
    "memory against `vipo plan`": "no step compares them yet",
    "training.joined_transitions": "no step yet; batch.* tells whether ratios would stay 1",
    "CUDA graphs, FP8 rollouts": "not built, docs/performance.md says why",
    "other families, several GPUs, decoding beside the next rollout": "no step yet",
    "DDP and FSDP2 over NCCL, world size 1": "no step yet; one process has a group for distribution.offload alone",
}


@dataclass(frozen=True)
class Step:
    """One process: its name, its limit in seconds, and what it answers."""

    name: str
    limit: float
    question: str


# In order of value; the limits of all are more than the whole may take, since few steps reach theirs.
STEPS = (
    Step("machine", 45, "the machine's own matrix product and memory bandwidth"),
    Step("agreement", 100, "does the device compute what the CPU does"),
    Step("bytes", 100, "the same run again, and killed and resumed: the same bytes"),
    Step("waits", 45, "how often the host waits for the device"),
    Step("flux", 90, "FLUX.1-dev at its real size"),
    Step("wan", 90, "Wan 2.1 1.3 B at its real size"),
    Step("sd3_lora", 60, "Stable Diffusion 3.5 medium at its real size, LoRA"),
    Step(
        "sd3_window", 60, "Stable Diffusion 3.5 medium as others count images per GPU-hour: a window of 2 trained steps"
    ),
    Step("sd3_full", 60, "Stable Diffusion 3.5 medium at its real size, all weights"),
    Step("sd3_options", 120, "compiled blocks and a bf16 map on and off, at sd3_window's size"),
    Step("flux_options", 150, "compiled blocks, attention backends and a bf16 map on and off, at FLUX.1-dev's size"),
    Step("adamw_options", 60, "AdamW in one kernel and by lists of tensors, at sd3_full's size"),
)


def machine_facts() -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    # A copy without its repository is told its commit, as a container is.
    facts["commit"] = git.stdout.strip() or os.environ.get("VIPO_GIT_COMMIT")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
        facts["gpus"] = found.stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        facts["gpus"] = f"nvidia-smi: {error}"
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_step(name: str, record: Record, device: str, tiny: bool, matmul_tflops: float | None) -> None:
    """The work of one step, in this process."""
    # Imported by the step that needs it: what fails to import there leaves the other steps alone.
    if name == "machine":
        from benchmarks.gpu.machine import measure_machine

        measure_machine(record, device, tiny)
    elif name.endswith("_options"):
        from benchmarks.gpu.options import OPTIONS, measure_options
        from benchmarks.gpu.sizes import REAL, TINY

        size, cases = OPTIONS[name]
        if tiny:
            # Kernels for a CPU take minutes to compile.
            cases = {case: chosen for case, chosen in cases.items() if "generator.compile=blocks" not in chosen}
        measure_options(record, (TINY if tiny else REAL)[size], device, cases)
    elif name not in ("agreement", "bytes", "waits"):
        from benchmarks.gpu.real_size import measure_family
        from benchmarks.gpu.sizes import REAL, TINY

        measure_family(record, (TINY if tiny else REAL)[name], device, matmul_tflops)
    else:
        from benchmarks.gpu import correct

        steps = {
            "agreement": correct.measure_agreement,
            "bytes": correct.measure_bytes,
            "waits": correct.measure_waits,
        }
        steps[name](record, device)


def supervise(
    step: Step, figures: Path, device: str, tiny: bool, seconds: float, matmul_tflops: float | None
) -> dict[str, Any]:
    """Run a step in a process of its own, for at most `seconds`; what it noted stays, however it ends."""
    command = [sys.executable, "-m", "benchmarks.gpu.gpu", "--step", step.name, "--device", device]
    command += ["--figures", str(figures)]
    command += ["--tiny"] if tiny else []
    command += [] if matmul_tflops is None else ["--matmul-tflops", str(matmul_tflops)]
    start, log = time.monotonic(), figures.with_suffix(".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
            told = "ok" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            # Its children too: a step starts trainings of its own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            told = f"ended by its limit of {seconds:.0f} s"
    found = {"question": step.question, "status": told, "seconds": round(time.monotonic() - start, 1)}
    if told != "ok":
        found["last_lines"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
    return found | {"figures": read_figures(figures)}


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
        lines.append(f"| **{name}** | {step['question']} | {step['status']}, {step['seconds']} s |")
        lines += [f"| {name} | {key} | {_cell(value)} |" for key, value in step["figures"].items()]
    lines += ["", "Not run:", "", *(f"- {what}: {why}" for what, why in results["not_run"].items()), ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) and 0 < abs(value) < 0.01 else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def run(output: Path, device: str, tiny: bool, budget: float, names: list[str]) -> dict[str, Any]:
    """All steps, one after the other, within `budget` seconds; writes ``gpu.json`` and ``gpu.md`` after each."""
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    results: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "tiny": tiny,
        "machine": machine_facts(),
        "steps": {},
        "not_run": dict(_NOT_WRITTEN),
    }
    for step in STEPS:
        left = budget - (time.monotonic() - start)
        if step.name not in names:
            results["not_run"][step.name] = "not asked for"
        elif left < 5:
            results["not_run"][step.name] = f"the {budget:.0f} s of the whole were used up"
        else:
            print(f"{step.name}: {step.question}", flush=True)
            tflops = results["steps"].get("machine", {}).get("figures", {}).get("matmul_tflops.bf16")
            found = supervise(step, output / f"{step.name}.jsonl", device, tiny, min(step.limit, left), tflops)
            results["steps"][step.name] = found
            print(f"{step.name}: {found['status']}, {found['seconds']} s", flush=True)
        results["seconds"] = round(time.monotonic() - start, 1)
        (output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (output / "gpu.md").write_text(table(results), encoding="utf-8")
    return results


def main() -> None:
    """Exit status 1 if a step failed; a step that its limit ended counts as one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("results/gpu"), help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="in miniature, on any machine: does it still run?")
    parser.add_argument("--budget", type=float, default=470, help="seconds of the whole")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--step", choices=[step.name for step in STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--matmul-tflops", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step, Record(arguments.figures), arguments.device, arguments.tiny, arguments.matmul_tflops)
        return
    names = arguments.only or [step.name for step in STEPS]
    results = run(arguments.output, arguments.device, arguments.tiny, arguments.budget, names)
    print((arguments.output / "gpu.md").read_text(encoding="utf-8"))
    sys.exit(int(any(step["status"] != "ok" for step in results["steps"].values())))


if __name__ == "__main__":
    main()
