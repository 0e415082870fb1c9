"""The `credit` stage: a measurement (`vipo.credit.meter`) of the sources of several arms, at one checkpoint."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.config.comparable import check_comparable
from vipo.config.meter import MeterConfig
from vipo.config.run import Config
from vipo.config.values import config_hash
from vipo.credit import Context, source_inputs
from vipo.credit.meter.directions import Directions
from vipo.credit.meter.gradients import MeterError
from vipo.credit.meter.measure import check_space, measure_reference, measure_updates, read_part
from vipo.credit.meter.plan import Plan, Record
from vipo.credit.meter.result import Result, summarise
from vipo.credit.meter.space import choose_space
from vipo.credit.meter.subject import Group, Subject
from vipo.determinism import deterministic_algorithms
from vipo.evaluation.meter_arms import load_arms, place_advantages
from vipo.generators import Generator, load_generator
from vipo.generators.embeddings import load_embeddings
from vipo.generators.starting import checkpoint_inputs
from vipo.prompts import read_prompts
from vipo.provenance.parts import load_json, save_json
from vipo.rewards import identities, load_rewards, weight_files
from vipo.sampling.chain import sampling_chain, stochastic_steps
from vipo.tracking.progress import progress_bar
from vipo.training.optimizers import load_optimizer
from vipo.training.state import content_hash

log = logging.getLogger(__name__)

# Beside the gradients of the sources (whole, and of one transition) and the reference.
_OTHER_VECTORS = 4
# Beside the parts of a measurement.
_COSTS = "costs.json"


@dataclass(frozen=True)
class Measured:
    """A measurement.

    Attributes:
        result: what was found.
        read: files and folders that were read.
        processes: what rewards that compute elsewhere tell of themselves, by label.
    """

    result: Result
    read: list[Path]
    processes: Mapping[str, Mapping[str, Any]]


def measure_credit(
    configs: Mapping[str, Config], meter: MeterConfig, root: Path, experiment: Path, parts: Path, weights: Path | None
) -> Measured:
    """Measure what the arms' credit is worth.

    Args:
        configs: the arms by name, the first being what the others are compared with.
        meter: how much is measured.
        root: repository root, for relative paths.
        experiment: ``results/<experiment>`` with prompts and embeddings of both splits.
        parts: folder of measurements in parts; one that was begun with the same settings goes on.
        weights: folder of a run's weights; None: the generator as it is.

    Raises:
        ConfigError: see `check_comparable`.
        MeterError: it cannot be measured as asked.
        Others: as of training.
    """
    first = next(iter(configs.values()))
    surrogate = check_comparable(configs)
    deterministic_algorithms()
    torch.set_num_threads(first.training.threads)
    train, held = (read_prompts(experiment / "prompts" / f"{split}.jsonl") for split in ("train", "eval"))
    generator = load_generator(first.generator, root)
    parameters = _trainable(first, generator, weights)
    widths, device = generator.conditioning_widths(first.generator, root), generator.device
    known, other = (
        load_embeddings(experiment / "embeddings" / f"{split}.safetensors", prompts, device, widths)
        for split, prompts in (("train", train), ("eval", held))
    )
    rewards = load_rewards(first.reward.terms, first.generator.device)
    schedule = (generator.prediction, generator.alphas_cumprod, generator.timesteps)
    chain = sampling_chain(first.sampling, *schedule, device=device)
    arms = load_arms(configs, Context(generator, train, rewards, first.perception, root))
    subject = Subject(
        generator,
        parameters,
        chain,
        stochastic_steps(first.sampling.window, len(chain.trainable), first.seed, 1),
        known | other,
        rewards,
        {term.label: term.weight for term in first.reward.terms},
        first.seed,
        first.training.group_size,
        first.training.micro_batch,
        first.sampling.same_initial_noise,
        surrogate.channels,
        surrogate.density,
        {f"{arm.key}/{name}": source for arm in arms.values() for name, source in arm.sources.items()},
        first.training.trained_transitions if first.training.transition_choice == "first" else None,
    )
    if first.sampling.window is not None and first.sampling.window.move != "fixed":
        window = subject.stochastic
        log.info("sampling.window moves: measured at update 1's, steps %d to %d", window[0] + 1, window[-1] + 1)
    plan = _plan(meter, first)
    vectors = 2 * len(arms) + min(plan.blocks, plan.reference_batches) + _OTHER_VECTORS
    space, told = choose_space(subject.size, vectors, 2**20 * meter.memory_mb, first.seed, device)
    log.info("%s", told)
    check_space(space, meter.directions, plan)
    optimizer = load_optimizer(first.optimizer, parameters.values())
    directions = Directions(meter.directions, parameters, optimizer, first.optimizer.max_grad_norm)
    read = [experiment / name / f"{split}.{end}" for name, end in (("prompts", "jsonl"), ("embeddings", "safetensors"))
            for split in ("train", "eval")]  # fmt: skip
    read += [*checkpoint_inputs(first.generator, root), *([] if weights is None else [weights])]
    read += [path for reward in rewards.values() for path in weight_files(reward)]
    read += [path for arm in arms.values() for path in source_inputs(arm.sources).values()]
    processes = identities(rewards)
    folder = parts / _identity(configs, meter, read, processes)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if read_part(folder / _COSTS, _told_costs) is None:
        # Of every update the same, so that one tells them.
        (folder / "update-0.json").unlink(missing_ok=True)
    costs = _costs(plan, subject, len(arms), len(meter.directions))
    whole = costs.reference * plan.reference_batches + costs.update * plan.updates + costs.steps * plan.stepped

    def placed(groups: Sequence[Group]) -> Mapping[str, Tensor]:
        placement = place_advantages(subject, arms, groups)
        if not (folder / _COSTS).is_file():
            save_json({name: costs.counted for name, costs in placement.costs.items()}, folder / _COSTS)
        return placement.values

    with progress_bar(total=whole, description="credit", unit="pass") as bar:

        def sampled() -> None:
            bar.update(costs.reference)

        def advance(records: Sequence[Record]) -> None:
            if len(records) > 2 and (needed := summarise(records, reference, meter.width, meter.confidence).needed):
                groups = needed.updates * plan.update_groups
                bar.set_postfix({f"for ± {meter.width:g}": f"{groups} groups"}, refresh=False)
            bar.update(costs.update + costs.steps * (len(records) <= plan.stepped))

        reference = None
        if plan.reference_batches:
            reference = measure_reference(subject, held, plan, space, folder, sampled)
        records = measure_updates(
            subject, train, held, list(arms), placed, directions, plan, space, reference, folder, advance
        )
    result = summarise(records, reference, meter.width, meter.confidence)
    result = replace(result, costs=_told_costs(folder / _COSTS))
    return Measured(result, list(dict.fromkeys(read)), processes)


def _told_costs(path: Path) -> dict[str, dict[str, int]]:
    told: dict[str, dict[str, int]] = load_json(path)
    if not all(isinstance(count, int) for costs in told.values() for count in costs.values()):
        raise TypeError("it holds no costs by arm")
    return told


@dataclass(frozen=True)
class Costs:
    """Passes through the network, forwards or backwards, of a batch of the reference, an update, its steps."""

    reference: int
    update: int
    steps: int


def _costs(plan: Plan, subject: Subject, arms: int, kinds: int) -> Costs:
    steps, batches = subject.chain.steps, -(-subject.group_size // subject.micro_batch)
    held = -(-plan.held_out * plan.held_out_samples // subject.micro_batch)
    return Costs(
        batches * 3 * steps,
        plan.update_groups * batches * (steps + len(subject.trained) * (1 + arms)),
        arms * kinds * held * steps,
    )


def _trainable(config: Config, generator: Generator, weights: Path | None) -> dict[str, torch.nn.Parameter]:
    training = config.training
    if weights is not None:
        generator.load_network(weights)
    if training.gradient_checkpointing:
        generator.recompute_activations()
    if training.lora is None:
        if any("lora_" in name for name, _ in generator.network.named_parameters()):
            raise MeterError(
                f"--weights {weights}: holds a LoRA, which a run without training.lora does not train; set "
                "training.lora as that run did"
            )
        generator.train_weights()
    elif weights is None:
        generator.add_lora(training.lora, config.seed)
    else:
        for name, value in generator.network.named_parameters():
            value.requires_grad_("lora_" in name)
    found = {name: value for name, value in generator.network.named_parameters() if value.requires_grad}
    if not found:
        raise MeterError(f"--weights {weights}: holds no LoRA, which training.lora asks for; give those of such a run")
    return found


def _plan(meter: MeterConfig, config: Config) -> Plan:
    return Plan(
        config.training.prompts_per_update,
        meter.updates,
        meter.reference,
        meter.blocks,
        meter.stepped,
        meter.held_out,
        meter.held_out_samples,
        meter.size,
        meter.change,
    )


def _identity(
    configs: Mapping[str, Config], meter: MeterConfig, read: Sequence[Path], processes: Mapping[str, Mapping[str, Any]]
) -> str:
    """What decides the parts of a measurement; how many updates, and what is told of them, decide none of it."""
    told = meter.model_dump(mode="json", exclude={"updates", "width", "confidence", "arms", "checkpoints"})
    data: dict[str, Any] = {
        "meter": told,
        "arms": {name: config.training_identity() for name, config in configs.items()},
        "inputs": [content_hash(path) for path in read],
    }
    if processes:
        data["reward_processes"] = processes
    return config_hash(data)


def write_result(result: Result, configs: Mapping[str, Config], meter: MeterConfig, path: Path) -> None:
    """The result and its settings as JSON: the same bytes for the same measurement."""
    first = next(iter(configs.values()))
    data = {
        "experiment": first.experiment.name,
        "seed": first.seed,
        "reward": first.reward.model_dump(mode="json"),
        "arms": {name: config.credit.model_dump(mode="json") for name, config in configs.items()},
        "meter": meter.model_dump(mode="json", exclude={"checkpoints"}),
        "result": result.as_json(),
    }
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
