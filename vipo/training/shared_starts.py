"""The steps before a window, drawn once for a group: its samples begin alike and draw no noise until there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vipo.config.run import Config
from vipo.generators.embeddings import stack_conditioning
from vipo.prompts import Prompt
from vipo.sampling.chain import stochastic_steps
from vipo.sampling.noise import Key
from vipo.sampling.rollout import ode_states
from vipo.training.setup import Setup

# Of updates, from the first, by which a run is judged before it starts.
_LOOKED_AT = 1000


def shared_starts(setup: Setup, number: int, prompts: Sequence[Prompt], until: int) -> dict[str, Tensor]:
    """The states of each prompt's samples up to the window, by the prompt's id.

    Which prompts share a network call does not depend on how many processes there are; each makes as many calls.

    Args:
        setup: the run.
        number: of the update.
        prompts: of the update, P of them.
        until: the window's first step, S.

    Returns:
        P of ``(S + 1, C, [T_lat,] H, W)`` float32, from the initial noise on; {} where nothing is shared.
    """
    config, window = setup.config, setup.config.sampling.window
    if window is None or not window.shared_start or until == 0:
        return {}
    size, processes = _together(config, len(prompts)), setup.distribution.data_processes
    calls = math.ceil(len(prompts) / size / processes) * processes
    found: list[Tensor] = []
    rows: list[int] = []
    for call in range(calls)[setup.distribution.data_rank :: processes]:
        places = range(call * size, (call + 1) * size)
        # Every call has as many: the last ones begin again with the first prompts.
        own = [prompts[place % len(prompts)].id for place in places]
        keys: list[Key] = [(config.seed, "initial", number, prompt, -1) for prompt in own]
        conditioning = stack_conditioning(setup.embeddings, own)
        with setup.timer("rollout"):
            found.append(ode_states(setup.generator, conditioning, setup.chain, until, keys, config.sampling.solver))
        rows += places
    states = setup.distribution.in_order(torch.cat(found), rows)
    return {prompt.id: own for prompt, own in zip(prompts, states, strict=False)}


def begun(starts: dict[str, Tensor], prompts: Sequence[Prompt]) -> Tensor | None:
    """The states ``(B, S + 1, C, [T_lat,] H, W)`` that a batch of samples begins with; None: none are shared."""
    return torch.stack([starts[prompt.id] for prompt in prompts]) if starts else None


def saved_evaluations(config: Config) -> tuple[int, int]:
    """How many network evaluations of an update's rollout are spared, on average, and the most states of a start."""
    sampling, training = config.sampling, config.training
    if sampling.window is None or not sampling.window.shared_start:
        return 0, 0
    starts = [
        stochastic_steps(sampling.window, sampling.steps - 1, config.seed, update).start
        for update in range(1, min(training.updates, _LOOKED_AT) + 1)
    ]
    size, processes = _together(config, training.prompts_per_update), config.distribution.world_size
    drawn = math.ceil(training.prompts_per_update / size / processes) * processes * size
    spared = training.prompts_per_update * training.group_size - drawn
    return round(spared * sum(starts) / len(starts)), max(starts) + 1


def _together(config: Config, prompts: int) -> int:
    return min(config.training.rollout_batch or config.training.micro_batch, prompts)
