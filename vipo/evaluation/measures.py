"""What is measured on samples that lie there as pictures: allocation maps, rewards, the change against the base.

One network is in memory at a time: what measures goes over all pictures before the next one is loaded.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.config.reward import RewardSpec
from vipo.config.run import Config
from vipo.demo.seen import foreground
from vipo.evaluation.held_out import HeldOut, sample_name
from vipo.memory import free
from vipo.perception import PerceptualStructuring, load_backbone
from vipo.prompts.vbench import is_measured
from vipo.rewards import identities, in_use, load_spec, score, weight_files

# In the order of the table.
_CHANGES = ("change/total", "change/foreground", "change/background")
#: Samples of the final weights whose maps are kept, the first ones: the report shows some of them.
MAPPED = 512


@dataclass(frozen=True)
class Batch:
    """Samples of one update, with their pictures and the base's, ``(N, [T,] 3, H, W)`` in [0, 1]."""

    update: int
    samples: Sequence[HeldOut]
    images: Tensor
    base: Tensor


Measured = dict[str, Tensor]


@dataclass(frozen=True)
class Measure:
    """What is measured on every batch of `parts`: pairs of an update and the number of a batch.

    Attributes:
        name: file-safe.
        opened: loads what measures, for the block, and gives it.
        holds: what one part holds: how many values by name, None where that is a map.
    """

    name: str
    parts: Sequence[tuple[int, int]]
    opened: Callable[[], AbstractContextManager[Callable[[Batch], Measured]]]
    holds: Callable[[int, int], Mapping[str, int | None]]

    def file(self, update: int, number: int) -> str:
        """Of one part."""
        return f"{self.name}-{update}-{number}.safetensors"


def measures_of(
    config: Config, root: Path, facts: dict[str, Any], batches: Sequence[Sequence[HeldOut]]
) -> list[Measure]:
    """Maps, then every column of the table in order.

    Args:
        config, root: as of every stage.
        facts: what the run's samples say of themselves.
        batches: of `vipo.evaluation.held_out.held_out_batches`.
    """
    updates, count = facts["updates"], len(batches)
    every = [(update, number) for update in updates for number in range(count)]
    mapped = -(-MAPPED // config.evaluation.batch)
    final = [(updates[-1], number) for number in range(min(count, mapped))]
    scene = config.generator.frames is None and all(
        "objects" in sample.prompt.metadata for batch in batches for sample in batch
    )

    def heat(update: int, number: int) -> dict[str, int | None]:
        return {sample_name(update, sample): None for sample in batches[number]}

    def columns(*names: str) -> Callable[[int, int], Mapping[str, int | None]]:
        return lambda _, number: dict.fromkeys(names, len(batches[number]))

    rewards = [
        Measure(f"reward{number}", every, partial(_reward, spec, config), columns(f"reward/{spec.label}"))
        for number, spec in enumerate(config.evaluation.rewards)
    ]
    change = Measure("change", every, partial(_change, scene), columns(*(_CHANGES if scene else _CHANGES[:1])))
    return [Measure("maps", final, partial(_maps, config, root, facts), heat), *rewards, change]


@contextlib.contextmanager
def _maps(config: Config, root: Path, facts: dict[str, Any]) -> Iterator[Callable[[Batch], Measured]]:
    device, groups = config.generator.device, facts["frame_groups"]
    structuring = PerceptualStructuring(load_backbone(config.perception, device, root), config.perception)
    structuring.preflight((config.evaluated.height, config.evaluated.width))
    spans = None if groups is None else [range(first, last) for first, last in groups]

    def measure(batch: Batch) -> Measured:
        found = structuring(batch.images.to(device), tuple(facts["grid"]), spans)
        found.check()
        named = zip(batch.samples, found.maps, strict=True)
        return {sample_name(batch.update, sample): heat.cpu().clone() for sample, heat in named}

    yield measure


@contextlib.contextmanager
def _reward(spec: RewardSpec, config: Config) -> Iterator[Callable[[Batch], Measured]]:
    device = config.generator.device
    reward = load_spec(spec, device)

    def measure(batch: Batch) -> Measured:
        found = torch.full((len(batch.samples),), math.nan)
        every = [sample.prompt for sample in batch.samples]
        if asked := [place for place, prompt in enumerate(every) if is_measured(spec.label, prompt.metadata)]:
            prompts = [every[place] for place in asked]
            texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
            values = score(spec.label, reward, batch.images[asked].to(device), texts, metadata)
            # As in training: what is not finite is no score.
            found[asked] = values.masked_fill(~values.isfinite(), math.nan)
        return {f"reward/{spec.label}": found}

    with in_use(reward):
        yield measure


@contextlib.contextmanager
def _change(scene: bool) -> Iterator[Callable[[Batch], Measured]]:
    yield lambda batch: image_change(batch.images, batch.base, scene)


def image_change(images: Tensor, base: Tensor, scene: bool) -> dict[str, Tensor]:
    """Mean absolute pixel change against the base's sample of the same prompt and noise, ``(N,)`` each in [0, 1].

    Args:
        images, base: ``(N, 3, H, W)``, or videos ``(N, T, 3, H, W)``.
        scene: whether the base's object can be told from its background by the border's colour; then the change is
            also split into the base picture's foreground and background.
    """
    change = (images - base).abs().mean(dim=-3)
    result = {"change/total": change.mean(dim=tuple(range(1, change.ndim)))}
    if scene:
        inside = foreground(base).float()
        result["change/foreground"] = (change * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp_min(1)
        result["change/background"] = (change * (1 - inside)).sum(dim=(1, 2)) / (1 - inside).sum(dim=(1, 2)).clamp_min(
            1
        )
    return result


@dataclass(frozen=True)
class Tried:
    """What the measures are.

    Attributes:
        backbone: what it is read from.
        rewards: what each is read from, by label.
        processes: what rewards elsewhere tell of themselves, by label.
    """

    backbone: list[Path]
    rewards: dict[str, list[Path]]
    processes: dict[str, dict[str, Any]]


def tried(config: Config, root: Path, samples: Sequence[HeldOut]) -> Tried:
    """What the measures read their networks from.

    One after the other is loaded, tried on a blank of the first of the `samples` that it is asked about, and gone
    again, before a picture is read: the last one may be the one that cannot be run.

    Raises:
        PerceptionError, RewardError: that one.
    """
    generator, device = config.evaluated, config.generator.device
    structuring = PerceptualStructuring(load_backbone(config.perception, device, root), config.perception)
    structuring.preflight((generator.height, generator.width))
    found = Tried([] if structuring.backbone.source is None else [structuring.backbone.source], {}, {})
    del structuring
    free(device)
    blank = torch.zeros(1, *generator.sample_shape, device=device)
    for spec in config.evaluation.rewards:
        reward = load_spec(spec, device)
        found.rewards[spec.label] = weight_files(reward)
        found.processes.update(identities({spec.label: reward}))
        every = [sample.prompt for sample in samples]
        prompt = next((prompt for prompt in every if is_measured(spec.label, prompt.metadata)), every[0])
        with in_use(reward):
            score(spec.label, reward, blank, [prompt.text], [prompt.metadata])
        del reward
        free(device)
    return found
