"""Memory of each setup on each hardware at its real size: computed by `vipo plan`, nothing is measured.

    python -m benchmarks.setup_table FILE.json [SETUP...]   # counts the named setups (all), keeps the other rows
    python -m benchmarks.setup_table FILE.json --table      # prints what docs/hardware.md shows

Without rewards' networks, with the prompts of one update; see `benchmarks.plan_table` for the checkpoints.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plan_table import recount, write_checkpoint
from vipo.config.compose import load_config, repository_root
from vipo.training.plan import plan

SETUPS: Mapping[str, str] = {
    "flux_paper": "flux_dev",
    "wan_paper": "wan",
    "sd35_medium": "sd35_medium",
    "flux2_klein": "flux2_klein",
    "qwen_image": "qwen_image",
    "qwen_image_21": "qwen_image_21",
}
"""Generators of `configs/generator/` by the setups that have them."""

HARDWARE: Mapping[str, int] = {"1x24gb": 24 * 2**30, "1x80gb": 80 * 2**30, "8x80gb": 80 * 2**30}
"""Bytes of a GPU by the hardware of `configs/hardware/`."""


def cell(setup: str, hardware: str) -> dict[str, Any]:
    """What a process of a setup's run needs."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(SETUPS[setup], Path(folder))
        config = load_config(
            [
                "experiment=ablation",
                f"setup={setup}",
                f"hardware={hardware}",
                f"generator.path={folder}",
                "prompts.source=prompts.txt",
                "reward=flicker" if setup == "wan_paper" else "reward=redness",
                "evaluation.rewards=[]",
            ]
        )
        prompts = config.training.prompts_per_update
        found = plan(config, repository_root(), prompts=prompts)
    return {
        "setup": setup,
        "hardware": hardware,
        "bytes": found.peak,
        "evaluation": found.evaluation,
        "trained": found.trained,
        "prompt": found.embeddings // prompts,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """As docs/hardware.md shows it."""
    lines = [
        f"| setup | trained (8x80gb) | {' | '.join(f'`{name}`' for name in HARDWARE)} "
        "| an evaluation | an embedded prompt |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for setup in SETUPS:
        row = {each["hardware"]: each for each in cells if each["setup"] == setup}
        last = row["8x80gb"]
        shown = [
            f"{row[name]['bytes'] / 2**30:.1f}"
            f"{': refused' * (max(row[name]['bytes'], row[name]['evaluation']) > there)}"
            for name, there in HARDWARE.items()
        ]
        lines.append(
            f"| `{setup}` | {last['trained'] / 1e9:.1f} B | {' | '.join(shown)} | {last['evaluation'] / 2**30:.1f} "
            f"| {last['prompt'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """See above."""
    recount(sys.argv[1:], "setup", dict.fromkeys(SETUPS, HARDWARE), cell, table)


if __name__ == "__main__":
    main()
