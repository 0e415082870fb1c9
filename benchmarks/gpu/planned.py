"""What `vipo plan` counts of the sizes that are measured, and what was measured against it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Record, others_go_on
from benchmarks.gpu.size import Size, family_overrides
from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.training.plan import plan

# The plan's phases by the parts that an update is timed in.
_PHASES = {"rollout": "rolls out", "decode": "decodes", "learn": "learns"}
_EVALUATION = "evaluation"


def count_plans(record: Record, sizes: Mapping[str, Size]) -> None:
    """Note the bytes of every size, by part, as `vipo plan` counts them; no device is asked.

    Raises:
        RuntimeError: one cannot be counted; the others were.
    """
    failed: list[str] = []
    for name, size in sizes.items():
        with others_go_on(record, name, failed), tempfile.TemporaryDirectory() as folder:
            for part, size_of in parts_planned(load_config(family_overrides(size, Path(folder), "cuda"))).items():
                record.put(_key(name, part), size_of)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def parts_planned(config: Config) -> dict[str, int]:
    """Bytes of a run by the parts that an update is timed in, as `vipo plan` counts them; of its evaluation too."""
    found = plan(config, repository_root(), config.training.prompts_per_update)
    held = sum(found.held.values())
    parts = {part: held + found.phases[phase] for part, phase in _PHASES.items()}
    return parts | {_EVALUATION: found.evaluation}


def _key(name: str, part: str) -> str:
    return f"{name}.bytes.{part}"


def planned_bytes(figures: Mapping[str, Any], name: str) -> dict[str, int]:
    """Of what `count_plans` noted, a size's bytes by part; empty where nothing was counted."""
    return {part: figures[key] for part in (*_PHASES, _EVALUATION) if (key := _key(name, part)) in figures}


def over_plan(peaks: Mapping[str, int], planned: Mapping[str, int], beside: int) -> dict[str, float]:
    """Measured over planned, by part: 1 where the plan is exact, above it where a run takes more.

    Args:
        peaks: measured bytes by part.
        planned: counted bytes by part.
        beside: measured bytes that no plan counts, the backbone's weights.
    """
    return {part: (peaks[part] - beside) / size for part, size in planned.items() if part in peaks}
