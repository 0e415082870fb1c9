"""Whether a reward that is loaded much later will be found then: after a training, which has no use for it."""

import os

from vipo.config.compose import repository_root
from vipo.config.reward import RewardSpec
from vipo.config.reward_options import places
from vipo.config.reward_process import ASKED
from vipo.rewards.child import python_of
from vipo.rewards.errors import RewardError
from vipo.rewards.registry import find_reward
from vipo.rewards.weights import at_hand, local_path, located

_SECONDS = 30.0


def check_found(spec: RewardSpec) -> None:
    """Look for all that a reward is made of; no weights are read, and what is asked over HTTP is not asked.

    Raises:
        RewardError: there is no such reward, it does not take the options, or its weights, environment or token are not
            here. Of a hub repository that is not in the cache, that the hub cannot be asked for it.
    """
    find_reward(spec.name, spec.options)
    try:
        _check_made_of(spec)
    except RewardError as error:
        raise RewardError(f"reward {spec.label!r}: {error}") from error


def _check_made_of(spec: RewardSpec) -> None:
    for name, revision in places(spec.name).items():
        written = str(spec.options[name])
        if revision is None:
            local_path(name, written)
        else:
            _check_located(name, written, spec.options[revision])
    if spec.name not in ASKED:
        return
    if (environment := spec.options.get("environment")) is not None:
        python_of(str(environment), repository_root())
    variable = spec.options.get("token_env")
    if variable is not None and not os.environ.get(str(variable)):
        raise RewardError(f"the environment has no {variable}; put the token there")


def _check_located(name: str, written: str, revision: object) -> None:
    commit = None if revision is None else str(revision)
    try:
        with at_hand():
            located(name, written, commit, ())
    except RewardError:
        # Not in the cache: it is fetched when it is loaded, if the hub has it for us.
        if not _on_hub(written, commit):
            raise


def _on_hub(repository: str, commit: str | None) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repository, revision=commit, timeout=_SECONDS)
    except Exception:
        return False
    return True
