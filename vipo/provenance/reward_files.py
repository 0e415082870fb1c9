"""Files that rewards read: those that a configuration names on this machine, and those that a record tells of.

Nothing heavy is imported: the workflow asks while its rules are read.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vipo.config.perception import PACKAGED
from vipo.config.registries import REWARDS
from vipo.config.reward import RewardSpec
from vipo.config.reward_options import places
from vipo.foreign import is_import_path
from vipo.provenance.records import checkpoint_files

OF = "of"
"""In a recorded input of the stage `score`: whose it is, ``reward LABEL``."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Configurations, tokenizers and texts, as published rewards have them.
_BESIDE = (".json", ".txt", ".model", ".jinja")
# What weights are called says nothing.
_ANY = ""


def local_files(rewards: Iterable[RewardSpec], root: Path) -> list[Path]:
    """Files on this machine that rewards are read from, of a folder all that may be.

    None of a hub repository, of a reward by import path, and of a process that runs already.
    """
    named = [root / str(own.options[name]) for own in _read_here(rewards) for name in places(own.name)]
    return list(dict.fromkeys(path for place in named for path in checkpoint_files(place, _WEIGHTS + _BESIDE)))


def _read_here(rewards: Iterable[RewardSpec]) -> Iterator[RewardSpec]:
    for reward in rewards:
        if reward.name != "process":
            yield reward
        elif reward.options["environment"] is not None and reward.options["reward"] in REWARDS:
            served = {"name": reward.options["reward"], "options": reward.options["arguments"]}
            yield RewardSpec.model_validate(served)


def reward_inputs(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    """The inputs of a recorded stage `score` that its rewards were read from; None where the record does not tell."""
    inputs: list[Mapping[str, Any]] = record["inputs"]
    if told := [entry for entry in inputs if OF in entry]:
        return told
    # An earlier vipo named none: samples came first, then the backbone, then the rewards.
    pictures = [place for place, entry in enumerate(inputs) if entry["path"].endswith("/pictures")]
    own = (record.get("config") or {}).get("perception")
    if not pictures or own is None or is_import_path(own["backbone"]):
        return None
    packaged = (own["backbone"], own["weights"]) == (PACKAGED, None)
    return inputs[pictures[-1] + (1 if packaged else 2) :]


def differing_files(told: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> Iterator[tuple[str, str, str]]:
    """Of each run that was scored by other files than the first one: such a file, which run read it, and which did not.

    A tokenizer may have more files in one cache than in another: what is no weights counts where both have it.

    Args:
        told: of each run, as `reward_inputs` gives them.
    """
    known = [(run, entries) for run, entries in told.items() if entries is not None]
    for own in known[1:]:
        for (run, mine), (other, theirs) in ((own, known[0]), (known[0], own)):
            if (path := _alone(mine, theirs)) is not None:
                yield path, run, other
                break


def _alone(mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str | None:
    """The first file of one side whose bytes the other side has not read."""
    own, other = ([_role_and_bytes(entry) for entry in side] for side in (mine, theirs))
    left, there = Counter(own) - Counter(other), {_ANY, *(role for role, _ in other)}
    alone = (entry["path"] for entry, key in zip(mine, own, strict=True) if key in left and key[0] in there)
    return next(alone, None)


def _role_and_bytes(entry: Mapping[str, Any]) -> tuple[str, str]:
    path = PurePosixPath(entry["path"])
    return _ANY if path.suffix in _WEIGHTS else path.name, entry["sha256"]
