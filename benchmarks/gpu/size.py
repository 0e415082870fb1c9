"""What a size is: a family's configurations, and the overrides of a run that measures it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.random_weights import write_layout

HERE = "benchmarks.gpu.random_weights"
"""Where the classes with random weights are."""


@dataclass(frozen=True)
class Size:
    """One row of the table: a family at one size.

    Attributes:
        family: import path of its class with random weights.
        parts: configurations of network and autoencoder.
        overrides: Hydra overrides; one prompt, few samples, one optimizer step.
        setting: what stands in the table.
    """

    family: str
    parts: Mapping[str, Mapping[str, Any]]
    overrides: tuple[str, ...]
    setting: str


def family_overrides(size: Size, folder: Path, device: str) -> list[str]:
    """Hydra overrides of a run of `size` on `device`; its layout and prompts are written below `folder`."""
    layout = write_layout(folder / "generator", size.parts)
    return run_overrides(size.family, layout, folder, device, size.overrides)


def run_overrides(family: str, layout: Path, folder: Path, device: str, overrides: Sequence[str]) -> list[str]:
    """Hydra overrides of a run whose prompts are written into `folder`.

    Args:
        family: import path.
        layout: the checkpoint's configurations.
        folder: exists.
        device: of the run.
        overrides: what is the size's own.
    """
    (folder / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(24)))
    return [
        "experiment=demo",
        "arm=vipo",
        "prompts=file",
        "reward=redness",
        "perception.layer=null",
        "perception.orientation=border",
        "training.save_at=[]",
        "evaluation.rewards=[redness]",
        "evaluation.prompts=2",
        f"prompts.source={folder / 'prompts.txt'}",
        f"generator.family='{family}'",
        f"generator.path={layout}",
        f"generator.device={device}",
        *overrides,
    ]


def update_of(transitions: int, micro_batch: int) -> tuple[str, ...]:
    """One prompt, four samples, one optimizer step."""
    return (
        "training.updates=2",
        "training.prompts_per_update=1",
        "training.group_size=4",
        "training.optimizer_steps_per_update=1",
        f"training.trained_transitions={transitions}",
        f"training.micro_batch={micro_batch}",
        # What is measured is not refused: the figure stands beside the tolerance.
        "training.log_ratio_tolerance=1e9",
    )


def evaluated(side: int, steps: int) -> tuple[str, ...]:
    """Samples of two prompts, in one batch."""
    return (f"evaluation.height={side}", f"evaluation.width={side}", f"evaluation.steps={steps}")


def window(samples: int) -> tuple[str, ...]:
    """Two transitions trained, all samples in one call."""
    return (
        "sampling.window={size: 2}",
        "training.trained_transitions=2",
        f"training.group_size={samples}",
        f"training.micro_batch={samples}",
    )


FULL = ("training.gradient_checkpointing=true", "generator.precision=bf16")
"""All weights, computed in bf16, activations recomputed."""

LORA = ("training.lora={rank: 16, alpha: 16}", "generator.weights=bf16", *FULL)
"""Rank 16, frozen weights in bf16."""
