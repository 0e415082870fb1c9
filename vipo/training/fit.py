"""Whether a planned run fits a device, and the settings with which it would."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from vipo.config.optimizer import AdamW8bitConfig
from vipo.config.run import Config
from vipo.generators.configured import held_to_sample
from vipo.training.errors import TrainingError
from vipo.training.plan import Plan, evaluation_bytes, gib, plan

_SAVINGS: tuple[Mapping[str, Any], ...] = (
    {"training": {"joined_transitions": 1, "rollout_batch": None}},
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
    if found.peak > memory:
        _refuse_training(config, root, prompts, found, memory)
    if short := _evaluation_short(config, root, found, memory):
        raise TrainingError(short)


def _refuse_training(config: Config, root: Path, prompts: int, found: Plan, memory: float) -> NoReturn:
    data, smaller = config.model_dump(), found
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
            data[section][key] = value
        changed = Config.model_validate(data)
        smaller = plan(changed, root, prompts)
        if smaller.peak <= memory:
            fits = f"it would fit with {_changes(config, data)} ({gib(smaller.peak)})"
            raise TrainingError(f"{short}; {fits}{_then(changed, root, smaller, memory)}")
    changes = _changes(config, data)
    still = f", and still {gib(smaller.peak)} with {changes}" if changes else ""
    if not config.distribution.offload and not isinstance(config.optimizer, AdamW8bitConfig):
        # Shards hold one precision, so weights are fp32 again.
        data["generator"]["weights"] = "fp32"
        data["distribution"] |= {"strategy": "fsdp", "offload": True}
        changed = Config.model_validate(data)
        smaller = plan(changed, root, prompts)
        if smaller.peak <= memory:
            raise TrainingError(
                f"{short}{still}; it would fit, and be slower, with {_changes(config, data)} ({gib(smaller.peak)}, and "
                f"{gib(sum(smaller.main.values()))} of main memory){_then(changed, root, smaller, memory)}"
            )
    raise TrainingError(
        f"{short}{still}; lower the generator's size, or "
        f"{'raise distribution.processes' if sharded else 'shard it: distribution.strategy=fsdp with more processes'}"
    )


def _then(config: Config, root: Path, found: Plan, memory: float) -> str:
    """What is to be said of a smaller run's evaluation."""
    short = _evaluation_short(config, root, found, memory)
    return f". But {short}" if short else ""


def _evaluation_short(config: Config, root: Path, found: Plan, memory: float) -> str:
    """Why samples of the trained weights cannot be drawn there, and what to do; empty where they can."""
    if found.evaluation <= memory:
        return ""
    size, batch = " x ".join(map(str, config.evaluated.sample_shape)), config.evaluation.batch
    single = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch": 1})})
    one = evaluation_bytes(single, root) if batch > 1 else found.evaluation
    if one <= memory:
        advice = f"lower evaluation.batch {batch}, or the size"
    elif held_to_sample(config.evaluated).weights == "bf16":
        advice = f"{gib(one)} with evaluation.batch=1: lower the size, or run the sample stage on a larger device"
    else:
        advice = (
            f"{gib(one)} with evaluation.batch=1, for it holds the whole network in fp32: run the sample stage on a "
            "larger device, lower the size, or train with generator.precision=bf16, which holds it in half of that"
        )
    return f"an evaluation at {size} needs {gib(found.evaluation)}, {gib(memory)} are there; {advice}"


def _changes(config: Config, data: Mapping[str, Any]) -> str:
    """What `data` has otherwise than `config`, as overrides."""
    given = config.model_dump()
    return " ".join(
        f"{section}.{key}={'null' if value is None else str(value).lower()}"
        for section in ("training", "generator", "distribution")
        for key, value in data[section].items()
        if value != given[section][key]
    )
