"""Peak memory of an update at real size by torch's own allocator, beside what `vipo plan` counts, without a GPU.

    REHEARSAL_GHOST=300000 benchmarks/gpu/rehearsal/rehearse.sh python -m benchmarks.gpu.rehearsal.peaks sd3_lora

Names are those of `benchmarks/gpu/sizes.py`. Nothing large is computed: its memory alone is taken and given back.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.planned import count_plans, over_plan, planned_bytes
from benchmarks.gpu.prepared import prepared_config
from benchmarks.gpu.real_size import GIB, MemoryTimer, backbone_bytes
from benchmarks.gpu.record import Record, read_figures
from benchmarks.gpu.size import Size, family_overrides
from benchmarks.gpu.sizes import REAL
from vipo.config.compose import repository_root
from vipo.runtime import settle_runtime
from vipo.training.setup import set_up
from vipo.training.update import update


def measured_peaks(size: Size) -> tuple[dict[str, int], int]:
    """Bytes by part of the second update, which has the optimizer's state, and those of the backbone's weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepared_config(family_overrides(size, folder, "cuda"), folder)
        setup = set_up(config, repository_root(), folder / config.experiment.name, writes=False)
        timer = MemoryTimer(setup.device)
        setup = replace(setup, timer=timer)
        update(setup, 1)
        timer.peaks.clear()
        update(setup, 2)
        return timer.peaks, backbone_bytes(setup)


def counted_bytes(name: str, sizes: Mapping[str, Size]) -> dict[str, int]:
    """What `vipo plan` counts of one of `sizes`, by part."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures"
        count_plans(Record(figures), {name: sizes[name]})
        return planned_bytes(read_figures(figures), name)


def main() -> None:
    """Print a row a part: measured without the backbone, which no plan counts, planned, and the one over the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(REAL), metavar="NAME", help=", ".join(sorted(REAL)))
    names = parser.parse_args().names
    settle_runtime()
    print("| size | part | measured, GiB | planned, GiB | measured / planned |\n|---|---|---:|---:|---:|")
    for name in names:
        planned = counted_bytes(name, REAL)
        peaks, beside = measured_peaks(REAL[name])
        for part, ratio in over_plan(peaks, planned, beside).items():
            measured = (peaks[part] - beside) / GIB
            print(f"| {name} | {part} | {measured:.3f} | {planned[part] / GIB:.3f} | {ratio:.4f} |", flush=True)


if __name__ == "__main__":
    main()
