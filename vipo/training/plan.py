"""`vipo plan`: what a run will hold, compute and write, counted before it is started. No weights are read.

The policy is made of the checkpoint's configurations with tensors that have shapes and no data, and called as an update
calls it: what autograd keeps for the backward pass is what the same code keeps there. Of rewards the networks are
counted, of credit the backbone; whatever else is there is named.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode

from vipo.config.run import Config
from vipo.credit.steps import step_costs
from vipo.generators.base import GeneratorError
from vipo.generators.configured import held_to_sample
from vipo.generators.counted import backward, counted_on
from vipo.generators.outline import longest_conditioning, outline
from vipo.generators.pipeline import PipelineGenerator
from vipo.objectives import load_objective
from vipo.objectives.objective import checked_keeps
from vipo.training.beside import beside
from vipo.training.checkpoints import run_bytes
from vipo.training.errors import TrainingError
from vipo.training.joined import check_joined
from vipo.training.peak import peak_bytes
from vipo.training.sharding import gathered_values
from vipo.training.shared_starts import saved_evaluations

_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)
_FP32 = 4


@dataclass(frozen=True)
class Plan:
    """What a run needs; bytes are those of each process.

    Attributes:
        held: bytes on the device that are there all the time, by part.
        main: bytes of main memory, by part, where ``distribution.offload`` keeps them there.
        phases: bytes beside them while an update rolls out, decodes, scores, maps and learns; the largest one counts.
        gradients: bytes of them on the device, of what is there while it learns.
        trained: parameters that are trained, of all processes.
        evaluations: of the network by one sample at one step, an update, by phase; guidance doubles the work of each.
        flops: an update's floating point operations in the network, of all processes.
        disk: bytes of a run's folder, at most.
        embeddings: bytes of the training prompts' embeddings, on disk.
        evaluation: bytes of a process that draws held-out samples, at its fullest moment: the network whole, whatever
            holds it in training.
        uncounted: what else is on the device, which these bytes are without, and why where that differs.
    """

    held: Mapping[str, int]
    main: Mapping[str, int]
    phases: Mapping[str, int]
    trained: int
    evaluations: Mapping[str, int]
    flops: int
    disk: int
    embeddings: int
    evaluation: int
    gradients: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of a process at an update's fullest moment."""
        return sum(self.held.values()) + max(self.phases.values())

    def text(self, tflops: float | None) -> str:
        """The table that people read; with `tflops`, what all processes together achieve, how long an update takes."""
        fullest = max(self.phases, key=lambda name: self.phases[name])
        rows = [(name, gib(size)) for name, size in self.held.items() if size]
        rows += [(f"while it {name}", gib(size)) for name, size in self.phases.items()]
        rows += [("of that gradients", gib(self.gradients))] if self.gradients else []
        rows.append((f"peak (while it {fullest})", gib(self.peak)))
        rows += [(f"in main memory: {name}", gib(size)) for name, size in self.main.items() if size]
        rows.append(("peak of an evaluation", gib(self.evaluation)))
        rows.append(("trained parameters", f"{self.trained:,}"))
        rows += [(f"network evaluations an update, {name}", f"{count:,}") for name, count in self.evaluations.items()]
        rows.append(("network operations an update", f"{self.flops / 1e12:,.1f} TFLOP"))
        if tflops is not None:
            rows.append((f"an update at {tflops:g} TFLOP/s", f"{self.flops / tflops / 1e12:,.1f} s"))
        rows.append(("disk of the run", gib(self.disk)))
        rows.append(("disk of the embeddings", gib(self.embeddings)))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value:>18}" for name, value in rows]
        return "\n".join([*lines, *(f"memory not counted: {name}" for name in self.uncounted)])

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""
        return {**asdict(self), "peak": self.peak}


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:,.2f} GiB"


class _Calls:
    """Calls of an outlined generator with `count` samples, of the longest prompts.

    Attributes:
        latents: ``(count, *latent_shape)``.
        conditioning: of as many prompts.
    """

    def __init__(self, generator: PipelineGenerator, root: Path, mode: FakeTensorMode, count: int) -> None:
        self._generator = generator
        self.conditioning = longest_conditioning(generator, root, count, mode)
        with mode:
            self.latents, self._times = torch.empty(count, *generator.latent_shape), torch.empty(count)

    @property
    def given(self) -> list[Tensor]:
        """What is there before a call."""
        return [self.latents, self._times, *self.conditioning.values()]

    def predict(self) -> Tensor:
        """One call."""
        return self._generator.predict(self.latents, self._times, self.conditioning)


def plan(config: Config, root: Path, prompts: int) -> Plan:
    """Count what a run needs.

    Args:
        config: of a run that trains.
        root: repository root, for relative paths.
        prompts: of the training split.

    Raises:
        TrainingError: the arm trains nothing.
        GeneratorError: the checkpoint's configurations cannot be read, or do not fit the run.
    """
    if config.is_base:
        raise TrainingError("arm 'base' is the generator as it is: there is nothing to plan; choose another arm")
    with counted_on(config.generator.device):
        return _counted(config, root, prompts)


def _counted(config: Config, root: Path, prompts: int) -> Plan:
    training, objective = config.training, load_objective(config.objective)
    keeps = checked_keeps(config.objective.name, objective.keeps)
    mode, distribution = FakeTensorMode(allow_non_fake_inputs=True), config.distribution
    # What is gathered is cast before the calls, which then make no copies of their own.
    cast = distribution.shards and config.generator.precision == "bf16"
    generator = outline(config.generator, root, mode, training.lora, cast=cast)
    check_joined(training, generator.network)
    if training.gradient_checkpointing:
        generator.recompute_activations()
    size, steps = training.micro_batch, config.sampling.steps
    joined, rolled = size * training.joined_transitions, training.rollout_batch or size
    learning, rolling = (_Calls(generator, root, mode, count) for count in (joined, rolled))
    with mode:
        clean = torch.empty(training.decode_batch or size, *generator.latent_shape)

    def lesson() -> None:
        backward(learning.predict().square().mean())

    # Of two networks in shards, the one that a sample of any process needs acts in all of them.
    shards = distribution.world_size if distribution.shards else 1
    apart = shards > 1 and training.transition_choice in ("per_sample", "stratified")
    generator.read_no_values(one_time=joined == 1 and not apart)
    # First, for it leaves the gradients that every later backward pass adds to; and apart from what is alive at once,
    # for what counts operations keeps tensors that would be gone.
    try:
        with mode, FlopCounterMode(display=False) as learned:
            lesson()
    except (*_NEEDS_DATA, GeneratorError) as error:
        # Of an adapter that is named by an import path, it is the cause of the error.
        if isinstance(error, GeneratorError) and not isinstance(error.__cause__, _NEEDS_DATA):
            raise
        raise GeneratorError(
            f"generator.family {config.generator.family!r}: its calls depend on values, such as how long the prompts "
            "are, so that they cannot be counted without data; measure an update of 'vipo train' instead"
        ) from error
    parts = (generator.network, generator.vae)
    learns = peak_bytes(mode, parts, learning.given, lesson)
    generator.read_no_values(one_time=True)
    with mode, torch.no_grad(), FlopCounterMode(display=False) as drawn:
        rolling.predict()
    with torch.no_grad():
        draws = peak_bytes(mode, parts, rolling.given, rolling.predict)
        decodes = peak_bytes(mode, parts, [clean], lambda: generator.pictures(clean))
    others = beside(config, root, generator, mode)

    samples = training.prompts_per_update * training.group_size
    spared, start = saved_evaluations(config)
    rollouts = samples * steps - spared
    own = samples // distribution.world_size
    kept = training.prompts_per_update * (training.best_of or training.group_size)
    policies = len(keeps) + (training.ema_decay is not None)
    referred = objective.needs_reference or training.base_distance
    compared = objective.needs_old + referred + ("anchor" in keeps)
    lessons = kept * training.trained_transitions * training.epochs
    parameters = list(generator.network.parameters())
    weights = _FP32 * sum(value.numel() for value in parameters) if cast else _bytes(parameters)
    # Tables of positions and the like, which each process has whole.
    buffers = _bytes(generator.network.buffers())
    trained = sum(value.numel() for value in parameters if value.requires_grad)
    gradients = _FP32 * trained // shards
    gathered, reduced = _gathered(generator.network, cast=cast) if distribution.shards else (0, 0)
    copied = referred and training.lora is None
    a_prompt = _bytes(rolling.conditioning.values()) // rolled
    pictures = own * math.prod(config.generator.sample_shape) * _FP32
    estimate = config.credit.steps
    credited = {"crediting": samples * step_costs(estimate, steps, 0).network_calls} if estimate == "ode" else {}
    sharded = {
        "network": weights // shards,
        "reference": weights // shards if copied else 0,
        "kept policies": policies * gradients,
        config.optimizer.title: round(config.optimizer.state_bytes * trained) // shards,
    }
    held = {
        **({} if distribution.offload else sharded),
        "network's buffers": buffers * (1 + copied),
        "gathered weights": gathered,
        "autoencoder": _bytes([*generator.vae.parameters(), *generator.vae.buffers()]),
        "embeddings": own * a_prompt,
        "trajectories": own * 2 * steps * math.prod(generator.latent_shape) * _FP32,
        "shared starts": training.prompts_per_update * start * math.prod(generator.latent_shape) * _FP32,
        **others.held,
    }
    there = 0 if distribution.offload else gradients
    learns += reduced + there
    return Plan(
        held=held,
        main={**sharded, "gradients": gradients} if distribution.offload else {},
        phases={
            "rolls out": draws + pictures,
            "decodes": decodes + pictures,
            **{name: size + pictures for name, size in others.calls.items()},
            "learns": learns,
        },
        trained=trained,
        evaluations={"rollouts": rollouts, "learning": lessons, "comparing": lessons * compared} | credited,
        flops=drawn.get_total_flops() * (rollouts + lessons * compared + sum(credited.values())) // rolled
        + learned.get_total_flops() * lessons // joined,
        disk=run_bytes(config, trained, policies),
        embeddings=prompts * a_prompt // (2 if config.generator.encoders == "bf16" else 1),
        evaluation=evaluation_bytes(config, root),
        gradients=there,
        uncounted=tuple(others.uncounted),
    )


def evaluation_bytes(config: Config, root: Path) -> int:
    """Bytes of a process that draws held-out samples, at its fullest moment, without rewards.

    Args:
        config, root: as of `plan`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with counted_on(config.generator.device), torch.no_grad():
        generator = outline(held_to_sample(config.evaluated), root, mode, config.training.lora)
        # As it is loaded to evaluate: of a weight that is trained autocast would keep what it rounds.
        generator.network.requires_grad_(False)
        generator.read_no_values(one_time=True)
        calls = _Calls(generator, root, mode, config.evaluation.batch)
        found = [
            peak_bytes(mode, (generator.network, generator.vae), calls.given, call)
            for call in (calls.predict, lambda: generator.pictures(calls.latents))
        ]
    parts = [value for part in (generator.network, generator.vae) for value in (*part.parameters(), *part.buffers())]
    return _bytes([*parts, *calls.given]) + max(found)


def _gathered(network: Any, *, cast: bool) -> tuple[int, int]:
    """Bytes that a device holds whole while a sharded network computes, and what gradients are there."""
    found, unit = gathered_values(network), 2 if cast else _FP32
    # As they come, and in fp32 where they are summed over the processes.
    summed = _FP32 * found.rest_trained + (unit + _FP32) * found.block_trained
    return _FP32 * found.rest + unit * found.blocks, summed


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)
