"""What is measured: a policy, what it is asked for, and what it is rewarded by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vipo.credit.meter.gradients import Chains, MeterError
from vipo.credit.source import CreditSource
from vipo.generators.base import Generator
from vipo.generators.embeddings import stack_conditioning
from vipo.prompts import Prompt
from vipo.rewards import Reward, score
from vipo.rewards.resident import by_network, in_use
from vipo.sampling.chain import Chain
from vipo.sampling.noise import Key, keyed_generator
from vipo.sampling.rollout import rollout
from vipo.sampling.transitions import Channels, Density


@dataclass(frozen=True)
class Subject:
    """A policy and its expected reward, at one checkpoint.

    Attributes:
        generator: the policy; `parameters` of its network require gradients.
        parameters: what a step would change, by name.
        chain: of the training samples.
        stochastic: its steps that draw noise, and so can be trained.
        embeddings: conditioning by prompt id.
        rewards, weights: by the label of their term.
        seed: keys every draw.
        group_size: samples of a prompt.
        micro_batch: samples of a network call.
        same_initial_noise: whether the samples of a group begin at the same noise.
        channels, density: of the log-probability.
        watching: sources by name, which are told of every batch of an update's samples that is drawn.
        lessons: how many stochastic steps, from the first, an update trains; None: any of them.
    """

    generator: Generator
    parameters: Mapping[str, nn.Parameter]
    chain: Chain
    stochastic: range
    embeddings: Mapping[str, Mapping[str, Tensor]]
    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    seed: int
    group_size: int
    micro_batch: int
    same_initial_noise: bool = True
    channels: Channels = "mean"
    density: Density = "gaussian"
    watching: Mapping[str, CreditSource] = field(default_factory=dict)
    lessons: int | None = None

    @property
    def trained(self) -> range:
        """The steps whose gradients an update takes the mean of."""
        return self.stochastic[: self.lessons]

    @property
    def size(self) -> int:
        """P, how many numbers a step changes."""
        return sum(value.numel() for value in self.parameters.values())


@dataclass(frozen=True)
class Group:
    """The samples of one prompt.

    Attributes:
        prompt: theirs.
        number: which group of its purpose, from 0; with the purpose it keys the noise.
        batches: in order.
        seen: of each source that watched, what it gave for each batch.
    """

    prompt: Prompt
    number: int
    batches: Sequence[Chains]
    seen: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def clean(self) -> Tensor:
        """``(G, C, [T,] H, W)``, the clean latents."""
        return torch.cat([batch.trajectory.clean for batch in self.batches])


Placed = Callable[[Sequence[Group]], Mapping[str, Tensor]]
"""Of the groups of one update: by source, the signed advantages ``(N, S or 1, [T,] H, W)``.

N are the samples of all groups in order, S the transitions of the chain, all steps but the last. The first source is
what the others are compared with: GRPO."""


def sample_group(subject: Subject, purpose: str, number: int, prompt: Prompt) -> Group:
    """Sample one prompt `subject.group_size` times, as an update does.

    Args:
        purpose, number: with the prompt and the sample, they key every draw.
    """
    batches: list[Chains] = []
    seen: dict[str, list[Any]] = {name: [] for name in subject.watching}
    for start in range(0, subject.group_size, subject.micro_batch):
        rows = range(start, min(subject.group_size, start + subject.micro_batch))
        for source in subject.watching.values():
            source.before_rollout(subject.generator, [prompt] * len(rows))
        wanted = [(prompt, index) for index in rows]
        (batch,) = sample_chains(subject, purpose, number, wanted, same_initial_noise=subject.same_initial_noise)
        for name, source in subject.watching.items():
            seen[name].append(source.after_rollout(subject.generator))
        batches.append(replace(batch, rows=tuple(rows)))
    return Group(prompt, number, batches, seen)


def sample_chains(
    subject: Subject,
    purpose: str,
    number: int,
    wanted: Sequence[tuple[Prompt, int]],
    *,
    same_initial_noise: bool = False,
) -> list[Chains]:
    """Sample prompts, in batches of `subject.micro_batch`.

    Args:
        purpose, number: key of the draws, beside each prompt and sample.
        wanted: prompts and which sample of theirs, in order; no pair twice.
        same_initial_noise: whether the samples of a prompt begin at the same noise.
    """
    batches = []
    for start in range(0, len(wanted), subject.micro_batch):
        chunk = wanted[start : start + subject.micro_batch]
        conditioning = stack_conditioning(subject.embeddings, [prompt.id for prompt, _ in chunk])
        initial: list[Key] = []
        steps: list[Key] = []
        for prompt, index in chunk:
            key = (subject.seed, "meter", purpose, number, prompt.id)
            initial.append((*key, "initial", -1 if same_initial_noise else index))
            steps.append((*key, "step", index))
        trajectory = rollout(subject.generator, conditioning, subject.chain, subject.stochastic, initial, steps)
        rows = tuple(range(start, start + len(chunk)))
        texts, metadata = [prompt.text for prompt, _ in chunk], [prompt.metadata for prompt, _ in chunk]
        batches.append(Chains(rows, conditioning, trajectory, texts, metadata))
    return batches


def drawn_prompts(prompts: Sequence[Prompt], seed: int, purpose: str, first: int, count: int) -> list[Prompt]:
    """Prompts `first` to ``first + count - 1`` of an endless row of keyed permutations."""
    chosen = []
    for place in range(first, first + count):
        number, index = divmod(place, len(prompts))
        order = torch.randperm(len(prompts), generator=keyed_generator(seed, "meter", purpose, "prompts", number))
        chosen.append(prompts[int(order[index])])
    return chosen


def chain_rewards(subject: Subject, batches: Sequence[Chains]) -> dict[str, Tensor]:
    """Each term of the reward, ``(N,)`` float32 on the CPU; not finite where a sample has none."""
    values: dict[str, list[Tensor]] = {name: [] for name in subject.rewards}
    # Those without a network need no use of their own: one decoding serves them all.
    groups: dict[int, dict[str, Any]] = {}
    for group in by_network(subject.rewards):
        groups.setdefault(id(getattr(next(iter(group.values())), "resident", None)), {}).update(group)
    for group in groups.values():
        with in_use(next(iter(group.values()))):
            for batch in batches:
                # Of one batch at a time: those of all may be gigabytes.
                pictures = subject.generator.pictures(batch.trajectory.clean)
                for name, reward in group.items():
                    values[name].append(score(name, reward, pictures, batch.texts, batch.metadata))
    return {name: torch.cat(parts) for name, parts in values.items()}


def total_reward(subject: Subject, batches: Sequence[Chains]) -> Tensor:
    """The weighted sum of the terms, ``(N,)`` float64; those of weight 0 are no part of it.

    Raises:
        MeterError: it is not finite.
    """
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for name, values in chain_rewards(subject, batches).items():
        if subject.weights[name] == 0:
            continue
        if not bool(values.isfinite().all()):
            texts = [text for batch in batches for text in batch.texts]
            worst = texts[int((~values.isfinite()).nonzero()[0])]
            raise MeterError(
                f"reward {name!r} is not finite for a held-out sample of {worst!r}: a reward that is missing cannot be "
                "compared before and after; mend it, or measure without it"
            )
        total = total + subject.weights[name] * values.double()
    return total
