"""What a run needs of its prompts, as far as the prompts themselves can tell."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from vipo.config.registries import SCENE_REWARDS
from vipo.config.run import Config
from vipo.prompts.prompt import Prompt, PromptError

# Intervals of an evaluation resample prompts.
LEAST_HELD_OUT = 2

log = logging.getLogger(__name__)


def check_needs(config: Config, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Refuse prompts that a run could not be trained or evaluated on, before anything is computed for it.

    Args:
        config: the run.
        train, held_out: both halves of the prompts; the second may be empty where ``prompts.eval_share`` is 0.

    Raises:
        PromptError: too few prompts for an update or for the evaluation's intervals, or prompts without the metadata
            that a reward or the credit source oracle reads.
    """
    source, training, evaluation = config.prompts.source, config.training, config.evaluation
    if not config.is_base and len(train) < training.prompts_per_update:
        raise PromptError(
            f"{source}: training.prompts_per_update {training.prompts_per_update} exceeds the {len(train)} training "
            "prompts; lower it or add prompts"
        )
    if config.prompts.eval_share and len(held_out) < LEAST_HELD_OUT:
        raise PromptError(
            f"{source}: prompts.eval_share {config.prompts.eval_share} leaves {len(held_out)} prompt for eval, the "
            f"evaluation's intervals need {LEAST_HELD_OUT}; raise it or add prompts"
        )
    if 0 < len(held_out) < evaluation.prompts:
        log.warning(
            "evaluation.prompts %d, but %d prompts are held out: all of these are used",
            evaluation.prompts,
            len(held_out),
        )
    if "oracle" in config.credit.names and not config.is_base:
        _need("credit source 'oracle'", ("objects",), source, train)
    for term in config.reward.terms:
        if term.name in SCENE_REWARDS and not config.is_base:
            _need_scenes(f"reward.terms: reward {term.name!r}", source, train)
    for name in evaluation.rewards:
        if name in SCENE_REWARDS:
            _need_scenes(f"evaluation.rewards: reward {name!r}", source, held_out)


def is_scene(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt's metadata is what the scene rewards read: a background, and objects that have a shape each."""
    objects = metadata.get("objects")
    return (
        "background" in metadata
        and isinstance(objects, list)
        and len(objects) > 0
        and all(isinstance(item, Mapping) and "shape" in item for item in objects)
    )


def _need_scenes(what: str, source: str, prompts: Sequence[Prompt]) -> None:
    _need(what, ("objects", "background"), source, prompts)
    for prompt in prompts:
        if not is_scene(prompt.metadata):
            raise PromptError(
                f"{source}: {what} needs scene metadata whose 'objects' are a list of mappings with a 'shape', as in "
                f"data/prompts; that of {prompt.text[:80]!r} is not"
            )


def _need(what: str, keys: Sequence[str], source: str, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        missing = [key for key in keys if key not in prompt.metadata]
        if missing:
            raise PromptError(
                f"{source}: {what} needs scene metadata with {', '.join(map(repr, missing))}, as in data/prompts; "
                f"{prompt.text[:80]!r} has none"
            )
