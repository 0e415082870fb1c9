"""What a run needs of its prompts, as far as the prompts themselves can tell."""

from collections.abc import Mapping, Sequence
from typing import Any

from vipo.config.registries import REWARDS, SCENE_REWARDS
from vipo.config.reward import RewardSpec
from vipo.config.run import Config
from vipo.prompts.geneval import geneval_fault
from vipo.prompts.prompt import Prompt, PromptError
from vipo.prompts.vbench import is_measured

# Intervals of an evaluation resample prompts.
LEAST_HELD_OUT = 2


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
    own = config.prompts.eval
    held_source = source if own is None else own.source
    if not config.is_base and len(train) < training.prompts_per_update:
        raise PromptError(
            f"{source}: training.prompts_per_update {training.prompts_per_update} exceeds the {len(train)} training "
            "prompts; lower it or add prompts"
        )
    if config.prompts.holds_out and len(held_out) < LEAST_HELD_OUT:
        share = "" if own is not None else f"prompts.eval_share {config.prompts.eval_share} "
        raise PromptError(
            f"{held_source}: {share}leaves {len(held_out)} prompt for eval, the "
            f"evaluation's intervals need {LEAST_HELD_OUT}; raise it or add prompts"
        )
    if "oracle" in config.credit.names and not config.is_base:
        _need("credit source 'oracle'", ("objects",), source, train)
    for term in () if config.is_base else config.reward.terms:
        _need_of(term, f"reward.terms: reward {term.name!r}", source, train)
    asked = evaluated(held_out, config)
    for reward in evaluation.rewards:
        _need_of(reward, f"evaluation.rewards: reward {reward.name!r}", held_source, held_out)
        measured = sum(is_measured(reward.label, prompt.metadata) for prompt in asked)
        if asked and measured < LEAST_HELD_OUT:
            raise PromptError(
                f"{held_source}: evaluation.rewards: reward {reward.label!r} is VBench's measure on the prompts whose "
                f"'dimension' names it, which {measured} of the {len(asked)} that evaluation.prompts takes do, and "
                f"intervals need {LEAST_HELD_OUT}; leave it out, or evaluate more prompts"
            )


def evaluated(held_out: Sequence[Prompt], config: Config) -> list[Prompt]:
    """Those of the held-out prompts that the evaluation takes, whatever the order of their file."""
    return sorted(held_out, key=lambda prompt: prompt.id)[: config.evaluation.prompts]


def told_split(config: Config, train: int, held_out: int) -> str:
    """How many prompts a run trains on and is evaluated on, for people.

    Args:
        config: the run.
        train, held_out: how many there are.
    """
    asked = config.evaluation.prompts
    told = f"{train} prompts to train on, {held_out} held out"
    if held_out > asked:
        return f"{told}, of which the evaluation takes evaluation.prompts {asked}"
    return f"{told}; evaluation.prompts {asked} asks for more: all of these are used" if 0 < held_out < asked else told


def drawn_text(text: str, metadata: Mapping[str, Any], key: str) -> str | None:
    """What a prompt asks to be written: its metadata's `key`, or what it holds between its first two ``"``.

    None where there is neither, or nothing but blanks.
    """
    parts = text.split('"')
    found = metadata.get(key, parts[1] if len(parts) > 2 else None)
    return found if isinstance(found, str) and found.strip() else None


def own_questions(metadata: Mapping[str, Any], key: str) -> list[tuple[str, str]] | None:
    """Questions and their answers that a prompt's metadata holds under `key`: pairs, or texts whose answer is yes.

    None where it holds none, or something else.
    """
    found = metadata.get(key)
    pairs = [(item, "yes") if isinstance(item, str) else item for item in found] if isinstance(found, list) else []
    whole = all(isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs)
    return [(question, answer) for question, answer in pairs] if pairs and whole else None


def is_scene(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt's metadata is what the scene rewards read: a background, and objects that have a shape each."""
    objects = metadata.get("objects")
    return (
        "background" in metadata
        and isinstance(objects, list)
        and len(objects) > 0
        and all(isinstance(item, Mapping) and "shape" in item for item in objects)
    )


def _need_of(reward: RewardSpec, what: str, source: str, prompts: Sequence[Prompt]) -> None:
    if reward.name == "process" and (served := str(reward.options["reward"])) in REWARDS:
        # It needs what the reward needs that is scored there.
        reward = RewardSpec.model_validate({"name": served, "options": reward.options["arguments"]})
    name, options = reward.name, reward.options
    if name in SCENE_REWARDS:
        _need_scenes(what, source, prompts)
    if name == "ocr":
        _need_texts(what, str(options["key"]), source, prompts)
    if name == "geneval":
        _need_claims(what, source, prompts)
    if name == "judge" and options.get("key") is not None:
        _need_questions(what, str(options["key"]), source, prompts)


def _need_questions(what: str, key: str, source: str, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if own_questions(prompt.metadata, key) is None:
            raise PromptError(
                f"{source}: {what} needs the prompt's own questions as metadata {key!r}, a list of texts, or of pairs "
                f"of question and answer; {prompt.text[:80]!r} has none"
            )


def _need_texts(what: str, key: str, source: str, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if drawn_text(prompt.text, prompt.metadata, key) is None:
            raise PromptError(
                f"{source}: {what} needs the text that is to be drawn, as metadata {key!r} or in double quotes; "
                f"{prompt.text[:80]!r} has none"
            )


def _need_claims(what: str, source: str, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if fault := geneval_fault(prompt.metadata):
            raise PromptError(f"{source}: {what} needs GenEval's metadata; of {prompt.text[:80]!r}, {fault}")


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
