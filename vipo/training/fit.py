"""Whether a planned run fits a device, and the settings with which it would."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipo.config.optimizer import AdamW8bitConfig
from vipo.config.run import Config
from vipo.training.errors import TrainingError
from vipo.training.plan import Plan, gib, plan

_SAVINGS: tuple[Mapping[str, Any], ...] = (
    {"training": {"gradient_checkpointing": True}},
    {"training": {"micro_batch": 1}},
    {"training": {"lora": {}}, "generator": {"precision": "bf16", "weights": "bf16"}},
)
"""What makes a run smaller, in the order in which it costs least."""


def require_fit(config: Config, root: Path, prompts: int, found: Plan, memory: float) -> None:
    """Refuse a run that does not fit.

    Args:
        config, root, prompts: as of `plan`.
        found: the run's plan.
        memory: bytes of a device, maybe infinite.

    Raises:
        TrainingError: naming what is short, and settings with which the run would fit.
    """
    if found.peak <= memory:
        return
    data, given, smaller = config.model_dump(), dict[str, Any](), found
    sharded = config.distribution.strategy == "fsdp"
    short = f"needs {gib(found.peak)} in each process, {gib(memory)} are there"
    for saving in _SAVINGS:
        fresh = [
            (section, key, value)
            for section, values in saving.items()
            for key, value in values.items()
            # An adapter that is there keeps its rank, and shards hold one precision.
            if data[section][key] != value
            and not (key == "lora" and data[section][key] is not None)
            and not (key == "weights" and sharded)
        ]
        if not fresh:
            continue
        for section, key, value in fresh:
            data[section] = {**data[section], key: value}
            given[f"{section}.{key}"] = value
        smaller = plan(Config.model_validate(data), root, prompts)
        if smaller.peak <= memory:
            raise TrainingError(f"{short}; it would fit with {_set(given)} ({gib(smaller.peak)})")
    still = f", and still {gib(smaller.peak)} with {_set(given)}" if given else ""
    if not config.distribution.offload and not isinstance(config.optimizer, AdamW8bitConfig):
        # Shards hold one precision, so weights are fp32 again.
        given = {key: value for key, value in given.items() if key != "generator.weights"}
        given |= {"generator.weights": "fp32"} if config.generator.weights == "bf16" else {}
        given |= {"distribution.strategy": "fsdp"} if not sharded else {}
        given["distribution.offload"] = True
        data["generator"] = {**data["generator"], "weights": "fp32"}
        data["distribution"] = {**data["distribution"], "strategy": "fsdp", "offload": True}
        smaller = plan(Config.model_validate(data), root, prompts)
        if smaller.peak <= memory:
            raise TrainingError(
                f"{short}{still}; it would fit, and be slower, with {_set(given)} ({gib(smaller.peak)}, and "
                f"{gib(sum(smaller.main.values()))} of main memory)"
            )
    raise TrainingError(
        f"{short}{still}; lower the generator's size, or "
        f"{'raise distribution.processes' if sharded else 'shard it: distribution.strategy=fsdp with more processes'}"
    )


def _set(given: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in given.items())
