"""What the script does, step by step, in the order of what it is worth."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.record import Record, read_figures


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of the step and of its files.
        limit: in seconds.
        question: what it answers.
        timed: whether its figures are times or memory, so that nothing may run beside it.
    """

    name: str
    limit: float
    question: str
    timed: bool = True


BUDGET = 465
"""Seconds of all steps; run.sh takes some more to install wheels."""
# Of those that measure no time, which run beside each other.
_BESIDE = 85
_FAMILIES = 4

# In the order of what they are worth: README.md has the timetable. The limits up to `sd3_options` together are the
# budget; what follows has what they leave.
STEPS = (
    Step("machine", 30, "the machine's own matrix product and memory bandwidth"),
    Step("agreement", _BESIDE, "does the device compute what the CPU does", timed=False),
    Step("bytes", _BESIDE, "the same run again, and killed and resumed: the same bytes", timed=False),
    Step("waits", _BESIDE, "how often the host waits for the device", timed=False),
    Step("processes", _BESIDE, "DDP and FSDP2 over NCCL: the same as one process alone", timed=False),
    Step("plan", _BESIDE, "what `vipo plan` counts of the sizes below", timed=False),
    *(
        Step(
            f"families_{part}",
            _BESIDE,
            f"every family in miniature, {part} of {_FAMILIES}: is it the stock pipeline, and its ratio 1",
            timed=False,
        )
        for part in range(1, _FAMILIES + 1)
    ),
    Step(
        "sd3_window", 65, "Stable Diffusion 3.5 medium as others count images per GPU-hour: a window of 2 trained steps"
    ),
    Step("flux", 80, "FLUX.1-dev at its real size"),
    Step("wan", 95, "Wan 2.1 1.3 B at its real size"),
    Step(
        "sd3_options",
        110,
        "no recomputation, compiled blocks, joined transitions, a second-order solver, at sd3_window's size",
    ),
    Step("sd3_full", 50, "Stable Diffusion 3.5 medium at its real size, all weights"),
    Step("flux_options", 90, "no recomputation, compiled blocks and attention backends, at FLUX.1-dev's size"),
    Step("adamw_options", 45, "AdamW in one kernel and by lists of tensors, at sd3_full's size"),
    Step("evaluation", 30, "Stable Diffusion 3.5 medium evaluated at 1024 x 1024, trained at 512 x 512"),
    Step("sd3_lora", 50, "Stable Diffusion 3.5 medium at its real size, LoRA, 4 trained steps"),
    Step("qwen_image_21", 65, "Qwen-Image 2.1 at its real size: a window of 2 trained steps, without guidance"),
)


def run_step(name: str, folder: Path, device: str, tiny: bool) -> None:
    """The work of one step, in this process; its figures go into ``folder/NAME.jsonl``, where earlier steps' are."""
    record = Record(figures_file(folder, name))
    # Imported by the step that needs it: what fails to import there leaves the other steps alone.
    if name == "machine":
        from benchmarks.gpu.machine import measure_machine

        measure_machine(record, device, tiny)
    elif name in ("agreement", "bytes"):
        from benchmarks.gpu.correct import measure_agreement, measure_bytes

        (measure_agreement if name == "agreement" else measure_bytes)(record, device)
    elif name == "waits":
        from benchmarks.gpu.waits import measure_waits

        measure_waits(record, device)
    elif name.startswith("families_"):
        from benchmarks.gpu.families import measure_families, share_of_families

        measure_families(record, device, share_of_families(int(name.removeprefix("families_")), _FAMILIES))
    elif name == "processes":
        from benchmarks.gpu.processes import measure_processes

        measure_processes(record, device)
    else:
        _measure_sizes(name, record, folder, device, tiny)


def _measure_sizes(name: str, record: Record, folder: Path, device: str, tiny: bool) -> None:
    from benchmarks.gpu.miniatures import TINY
    from benchmarks.gpu.planned import planned_bytes
    from benchmarks.gpu.sizes import REAL

    sizes, counted = TINY if tiny else REAL, read_figures(figures_file(folder, "plan"))
    if name == "plan":
        from benchmarks.gpu.planned import count_plans

        count_plans(record, sizes)
    elif name == "evaluation":
        from benchmarks.gpu.evaluation import measure_evaluation

        measure_evaluation(record, sizes["sd3_lora"], device, planned_bytes(counted, "sd3_lora"))
    elif name.endswith("_options"):
        from benchmarks.gpu.options import OPTIONS, measure_options

        size, cases = OPTIONS[name]
        if tiny:
            # Kernels for a CPU take minutes to compile.
            cases = {case: chosen for case, chosen in cases.items() if "generator.compile=blocks" not in chosen}
        measure_options(record, sizes[size], device, cases)
    else:
        from benchmarks.gpu.real_size import measure_family

        tflops = read_figures(figures_file(folder, "machine")).get("matmul_tflops.bf16")
        measure_family(record, sizes[name], device, tflops, planned_bytes(counted, name))


def figures_file(folder: Path, name: str) -> Path:
    """Of a step, below the folder of the results."""
    return folder / f"{name}.jsonl"
