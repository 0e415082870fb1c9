"""What is on a process's device beside the generator: rewards' networks and the backbone, counted without weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vipo.config.credit import BackboneCreditConfig, ContrastCreditConfig
from vipo.config.reward import RewardTerm
from vipo.config.reward_options import REWARD_OPTIONS, NetworkOptions
from vipo.config.reward_process import ProcessOptions
from vipo.config.run import Config
from vipo.foreign import is_import_path
from vipo.generators.outline import without_data
from vipo.generators.pipeline import PipelineGenerator
from vipo.perception import PerceptualStructuring
from vipo.perception.errors import PerceptionError
from vipo.perception.loading import backbone_without_weights
from vipo.rewards import Reward, RewardError, by_network, load_rewards
from vipo.rewards.networks import network_bytes
from vipo.rewards.weights import at_hand
from vipo.text import one_line
from vipo.training.peak import peak_bytes

_REASON = 160


@dataclass
class Beside:
    """Bytes of what is beside the generator.

    Attributes:
        held: all the time, by part.
        calls: while something is called, by what the process does then.
        uncounted: what is there and was not counted, and why.
    """

    held: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)


def beside(config: Config, root: Path, generator: PipelineGenerator, mode: FakeTensorMode) -> Beside:
    """Count what a run has beside its generator.

    Args:
        config: of a run that trains.
        root: repository root, for relative paths.
        generator: its outline.
        mode: the outline's.
    """
    found = Beside()
    _rewards(config.reward.terms, found)
    if config.credit.reads_backbone:
        _backbone(config, root, generator, mode, found)
    return found


def _backbone(config: Config, root: Path, generator: PipelineGenerator, mode: FakeTensorMode, found: Beside) -> None:
    try:
        backbone = backbone_without_weights(config.perception, root)
    except PerceptionError as error:
        found.uncounted.append(f"backbone {config.perception.backbone} ({one_line(str(error), _REASON)})")
        return
    sources = config.credit.sources
    maps = sum(isinstance(source, BackboneCreditConfig) for source in sources)
    compared = sum(isinstance(source, ContrastCreditConfig) and source.of == "features" for source in sources)
    groups = generator.frame_groups
    with mode:
        without_data(backbone)
        pictures = torch.empty(config.training.micro_batch, *config.generator.sample_shape, device="meta")
        seen = torch.empty(pictures.shape).flatten(0, -4)
    # Maps are made of features without looking at them, as on an accelerator, where they are on no CPU.
    backbone.register_forward_pre_hook(lambda _, given: seen[: len(given[0])])
    backbone.register_forward_hook(lambda _, given, features: features.to("meta"))
    structuring = PerceptualStructuring(backbone, config.perception)
    calls: list[Callable[[], object]] = []
    if maps:
        calls.append(lambda: structuring(pictures, generator.grid, groups))
    if compared:
        calls.append(lambda: backbone(pictures if groups is None else pictures[:, 0]))
        found.uncounted.append("features that the source contrast compares")
    # Each source loads its own.
    parts = (*backbone.parameters(), *backbone.buffers())
    found.held["backbone"] = (maps + compared) * sum(value.numel() * value.element_size() for value in parts)
    with torch.no_grad():
        found.calls["maps"] = max(peak_bytes(mode, [backbone], [pictures, seen], call) for call in calls)


def _rewards(terms: Sequence[RewardTerm], found: Beside) -> None:
    networks: dict[str, NetworkOptions] = {}
    rewards: dict[str, Reward] = {}
    for term in terms:
        section = REWARD_OPTIONS.get(term.name)
        options = None if section is None else section.model_validate(term.options)
        if is_import_path(term.name):
            found.uncounted.append(f"reward {term.title} (others' code)")
        elif isinstance(options, ProcessOptions) and options.environment is not None and options.device is None:
            found.uncounted.append(f"reward {term.title} (a process of its own on the generator's device)")
        elif isinstance(options, NetworkOptions):
            networks[term.label] = options
    sizes: dict[str, int] = {}
    with at_hand():
        for term in terms:
            if term.label not in networks:
                continue
            try:
                rewards |= load_rewards([term])
                sizes[term.label] = network_bytes(rewards[term.label], networks[term.label])
            except RewardError as error:
                found.uncounted.append(f"reward {term.title} ({one_line(str(error), _REASON)})")
        # Together, for several may be of one network.
        shared = by_network(load_rewards(term for term in terms if term.label in sizes))
    if not sizes:
        return
    # Of a network that is elsewhere between its uses, one is there at a time.
    first = [next(iter(group)) for group in shared]
    kept = [sizes[label] for label in first if networks[label].resident == "keep"]
    found.held["rewards"] = sum(kept)
    found.calls["scores"] = max((sizes[label] for label in first if networks[label].resident != "keep"), default=0)
    found.uncounted.append("what the rewards' networks make while they score")
