"""Everything that a run loads and checks before its first computation."""

import copy
import itertools
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from vipo.config.experiment import check_processes, check_solver
from vipo.config.run import Config
from vipo.config.training import EMA
from vipo.credit import Context, CreditSource, load_sources, source_inputs
from vipo.determinism import deterministic_algorithms
from vipo.generators import Generator, load_generator
from vipo.generators.embeddings import Embeddings, load_embeddings, stack_conditioning
from vipo.generators.kernels import use_kernels
from vipo.generators.sharded import load_to_shard
from vipo.generators.starting import checkpoint_inputs
from vipo.objectives import Objective, load_objective
from vipo.objectives.objective import checked_keeps
from vipo.prompts import Prompt, read_prompts
from vipo.rewards import Reward, load_rewards, score, weight_files
from vipo.rewards.early import check_found
from vipo.sampling.chain import Chain, chain_remarks, sampling_chain
from vipo.tracking.timer import Timer
from vipo.training.checkpoints import run_bytes
from vipo.training.distribution import Distribution
from vipo.training.errors import TrainingError
from vipo.training.evaluated import evaluated_shift
from vipo.training.joined import check_joined
from vipo.training.old_policy import OldPolicy
from vipo.training.optimizers import load_optimizer
from vipo.training.samples import update_prompts
from vipo.training.trial import try_kernels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """A run, loaded.

    Attributes:
        config: the run.
        experiment: ``results/<experiment>``.
        distribution: the processes of the run.
        prompts: of the training split.
        generator: the policy; its network is wrapped by `distribution`.
        reference: the network as it was, for the KL divergence of full fine-tuning; with LoRA it is the policy without
            its adapter, and None here.
        embeddings: conditioning by prompt id, in files.
        rewards: by the label of their term.
        sources: of credit, by name; none where the advantage is a scalar.
        objective: the loss.
        kept: policies that follow the trained one, as the objective asks, and `EMA` where it is kept.
        chain: noise levels and transition.
        trainable: parameters that are trained, by name; of a sharded network this process's shards.
        optimizer: of those.
        weight_inputs: folders and files that weights were read from, by what they are.
        timer: seconds by part.
    """

    config: Config
    experiment: Path
    distribution: Distribution
    prompts: list[Prompt]
    generator: Generator
    reference: nn.Module | None
    embeddings: Embeddings
    rewards: dict[str, Reward]
    sources: dict[str, CreditSource]
    objective: Objective
    kept: dict[str, OldPolicy]
    chain: Chain
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    weight_inputs: dict[str, Path]
    timer: Timer = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.distribution.device

    @property
    def folder(self) -> Path:
        """``results/<experiment>/runs/<arm>-s<seed>``."""
        return self.experiment / "runs" / self.config.run_name


def prompts_path(experiment: Path) -> Path:
    """Where the training split of an experiment is."""
    return experiment / "prompts" / "train.jsonl"


def embeddings_path(experiment: Path) -> Path:
    """Where its embeddings are."""
    return experiment / "embeddings" / "train.safetensors"


def set_up(config: Config, root: Path, experiment: Path, *, writes: bool = True) -> Setup:
    """Load a run and check it.

    Args:
        config: the run.
        root: repository root, for relative paths.
        experiment: ``results/<experiment>`` with prompts and embeddings.
        writes: whether the run is written, so that there has to be room for it; not where its updates are measured.

    Raises:
        ConfigError, TrainingError, GeneratorError, RewardError, CreditError, ObjectiveError, PerceptionError,
            PromptError: what cannot work.
    """
    if config.is_base:
        raise TrainingError(
            "arm 'base' is the generator as it is: there is nothing to train; choose another arm, or evaluate it"
        )
    deterministic_algorithms()
    check_processes(config)
    check_solver(config)
    distribution = Distribution(config.distribution, config.generator.device)
    # After accelerate, which on several CPU processes takes the number of threads from the machine.
    torch.set_num_threads(config.training.threads)
    device = distribution.device
    prompts = read_prompts(prompts_path(experiment))
    update_prompts(prompts, config.seed, 1, config.training.prompts_per_update)
    # Loaded by an evaluation alone, after all training.
    for spec in config.evaluation.rewards:
        check_found(spec)
    if distribution.shards:
        generator = load_to_shard(config.generator, root, whole=distribution.is_main)
    else:
        generator = load_generator(config.generator, root)
    weight_inputs = {f"generator {i}": path for i, path in enumerate(checkpoint_inputs(config.generator, root))}
    widths = generator.conditioning_widths(config.generator, root)
    embeddings = load_embeddings(embeddings_path(experiment), prompts, device, widths)
    rewards = load_rewards(config.reward.terms, config.generator.device)
    for label, reward in rewards.items():
        weight_inputs |= {f"reward {label} {i}": path for i, path in enumerate(weight_files(reward))}
    sources, objective = load_sources(config.credit), load_objective(config.objective)
    keeps = checked_keeps(config.objective.name, objective.keeps)
    if config.sampling.ode is not None and objective.needs != "none":
        raise TrainingError(
            f"sampling.ode {config.sampling.ode!r}: objective {config.objective.name!r} needs noise in the chain's "
            "steps; set sampling.ode=null"
        )
    if config.credit.steps != "none" and objective.needs == "none":
        raise TrainingError(
            f"credit.steps {config.credit.steps!r} gives transitions advantages of their own, and objective "
            f"{config.objective.name!r} trains none; set credit.steps=none"
        )
    context = Context(generator, prompts, rewards, config.perception, root, distribution.is_main)
    for source in sources.values():
        source.set_up(context)
    weight_inputs |= source_inputs(sources, weight_inputs)
    _try_rewards(config, rewards, prompts[0], device)
    check_joined(config.training, generator.network)
    chain = load_chain(config, root, generator, distribution)
    compared = objective.needs_reference or config.training.base_distance
    reference = _prepare_network(config, generator, distribution, compared)
    network = distribution.unwrap(generator.network)
    trainable = {name: value for name, value in network.named_parameters() if value.requires_grad}
    optimizer = load_optimizer(config.optimizer, trainable.values())
    kept = [*keeps, *([] if config.training.ema_decay is None else [EMA])]
    setup = Setup(
        config,
        experiment,
        distribution,
        prompts,
        generator,
        reference,
        embeddings,
        rewards,
        sources,
        objective,
        {name: OldPolicy(generator.network, trainable) for name in kept},
        chain,
        trainable,
        optimizer,
        weight_inputs,
        Timer(device),
    )
    if writes:
        _check_disk(setup)
    _check_memory(setup)
    if config.generator.chooses_kernels:
        size = config.training.micro_batch * config.training.joined_transitions
        try_kernels(generator, stack_conditioning(embeddings, [prompts[0].id] * size), chain)
    return setup


def load_chain(config: Config, root: Path, generator: Generator, distribution: Distribution) -> Chain:
    """The chain of training samples; tells in what it, or the evaluation's, is not the checkpoint's.

    Raises:
        ChainError, GeneratorError: one of both does not fit the generator.
    """
    sampling, schedule = config.sampling, (generator.prediction, generator.alphas_cumprod, generator.timesteps)
    chain = sampling_chain(sampling, *schedule, device=distribution.device)
    # What only the evaluation would refuse, before all training.
    later = config.evaluation.sampling_of(sampling)
    evaluated = sampling_chain(later, *schedule, steps=config.evaluation.steps)
    levels = None if generator.alphas_cumprod is None else len(generator.alphas_cumprod)
    own = config.evaluated != config.generator or later != sampling
    told = (
        chain_remarks(chain, sampling, generator.flow_shift, levels),
        chain_remarks(
            evaluated, later, evaluated_shift(config, root, generator), levels, "evaluation" if own else "sampling"
        ),
    )
    for remark in dict.fromkeys(itertools.chain(*told)) if distribution.is_main else ():
        log.warning("%s", remark)
    return chain


def _try_rewards(config: Config, rewards: dict[str, Reward], prompt: Prompt, device: torch.device) -> None:
    blank = torch.zeros(1, *config.generator.sample_shape, device=device)
    for name, reward in rewards.items():
        score(name, reward, blank, [prompt.text], [prompt.metadata])


def _prepare_network(
    config: Config, generator: Generator, distribution: Distribution, needs_reference: bool
) -> nn.Module | None:
    """Make the generator's network the policy that is trained; gives the reference where one is kept beside it."""
    training = config.training
    if training.gradient_checkpointing:
        generator.recompute_activations()
    # The generator as it was: with LoRA, the network without its adapter.
    reference = copy.deepcopy(generator.network) if needs_reference and training.lora is None else None
    if reference is not None and config.generator.chooses_kernels:
        # A copy is not compiled.
        use_kernels(reference, config.generator)
    if training.lora is None:
        generator.train_weights()
    else:
        generator.add_lora(training.lora, config.seed)
    precision = config.generator.precision
    generator.network = distribution.wrap(generator.network, precision)
    return None if reference is None else distribution.wrap(reference, precision)


def _check_disk(setup: Setup) -> None:
    folder, count = setup.folder, sum(value.numel() for value in setup.trainable.values())
    needed = run_bytes(setup.config, count, len(setup.kept))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"{folder}: {free / 2**20:.0f} MiB free, about {needed / 2**20:.0f} MiB are needed; "
            "free space or lower training.keep_checkpoints"
        )


def _check_memory(setup: Setup) -> None:
    config, kept = setup.config, len(setup.kept)
    count = sum(value.numel() for value in setup.trainable.values())
    if setup.device.type == "cuda" and not config.distribution.offload:
        total = torch.cuda.get_device_properties(setup.device).total_memory
        frozen = 0 if setup.reference is None else sum(value.numel() for value in setup.reference.parameters())
        shards = setup.distribution.processes if setup.distribution.shards else 1
        state = ((4 * (2 + kept) + config.optimizer.state_bytes) * count + 4 * frozen) / shards
        if state > total:
            raise TrainingError(
                f"weights, gradients and optimizer state of {count / 1e9:.1f} G parameters, and the reference and the "
                f"{kept} policies that are kept beside them, need {state / 2**30:.0f} GiB in each "
                f"process, the device has {total / 2**30:.0f}; use training.lora, or distribution.strategy=fsdp "
                "on more devices, or with distribution.offload=true"
            )
