"""Peak memory of an update at real size by torch's own allocator, beside what `vipo plan` counts, without a GPU.

    REHEARSAL_GHOST=300000 benchmarks/gpu/rehearsal/rehearse.sh python -m benchmarks.gpu.rehearsal.peaks sd3_lora

Names are those of `benchmarks/gpu/sizes.py`, or generators of `configs/generator/` (`generator=z_image`: LoRA, two
samples, one in a call). Nothing large is computed: its memory alone is taken and given back.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.gpu.planned import over_plan, parts_planned
from benchmarks.gpu.prepared import prepared_config
from benchmarks.gpu.real_size import GIB, MemoryTimer, backbone_bytes
from benchmarks.gpu.rehearsal.unloaded import unloaded_overrides
from benchmarks.gpu.size import family_overrides
from benchmarks.gpu.sizes import REAL
from benchmarks.plan_table import GENERATORS
from vipo.config.compose import load_config, repository_root
from vipo.runtime import settle_runtime
from vipo.training.setup import set_up
from vipo.training.update import update

_GENERATOR = "generator="


Overrides = Callable[[Path], list[str]]
"""Hydra overrides of a run on the device; what it reads is written into the folder that is given."""


def overrides_of(name: str) -> Overrides:
    """Of a run of what `name` says."""
    generator = name.removeprefix(_GENERATOR)
    if generator != name:
        return partial(unloaded_overrides, generator, device="cuda")
    return partial(family_overrides, REAL[name], device="cuda")


def measured_peaks(overrides: Overrides) -> tuple[dict[str, int], int]:
    """Bytes by part of the second update, which has the optimizer's state, and those of the backbone's weights."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = prepared_config(overrides(folder), folder)
        setup = set_up(config, repository_root(), folder / config.experiment.name, writes=False)
        timer = MemoryTimer(setup.device)
        setup = replace(setup, timer=timer)
        update(setup, 1)
        timer.peaks.clear()
        update(setup, 2)
        return timer.peaks, backbone_bytes(setup)


def counted_bytes(overrides: Overrides) -> dict[str, int]:
    """What `vipo plan` counts of it, by part."""
    with tempfile.TemporaryDirectory() as temporary:
        return parts_planned(load_config(overrides(Path(temporary))))


def main() -> None:
    """Print a row a part: measured without the backbone, which no plan counts, planned, and the one over the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*sorted(REAL), *(_GENERATOR + name for name in GENERATORS)]
    parser.add_argument("names", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    names = parser.parse_args().names
    settle_runtime()
    print("| size | part | measured, GiB | planned, GiB | measured / planned |\n|---|---|---:|---:|---:|")
    for name in names:
        planned = counted_bytes(overrides_of(name))
        peaks, beside = measured_peaks(overrides_of(name))
        for part, ratio in over_plan(peaks, planned, beside).items():
            measured = (peaks[part] - beside) / GIB
            print(f"| {name} | {part} | {measured:.3f} | {planned[part] / GIB:.3f} | {ratio:.4f} |", flush=True)


if __name__ == "__main__":
    main()
