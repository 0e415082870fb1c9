"""What a reward is, how it is found by name, and how it is called."""

import copy
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from vipo.config.registries import REWARDS, registered
from vipo.config.reward import RewardSpec
from vipo.config.validation import ConfigError, validate_section
from vipo.foreign import foreign, resolve
from vipo.rewards.errors import RewardError
from vipo.rewards.frames import OfFrames
from vipo.rewards.scored import Reward, Scored
from vipo.text import listed

_TOLD = 5


def find_reward(name: str, options: Mapping[str, Any] | None = None) -> tuple[Any, BaseModel | None]:
    """The object that `name` names, imported but not called yet, and its checked options.

    A registered name stands for an import path, and an import path ``package.module:object`` names the object itself.

    Returns:
        A callable, or a class of callables; and of a class that has an attribute ``Options``, a pydantic model, an
        instance of that, else None.

    Raises:
        RewardError: no such reward, its module cannot be imported, the object is not callable, or it does not take
            such options.
    """
    try:
        registered(name, REWARDS, "reward")
    except ValueError as error:
        raise RewardError(str(error)) from error
    path = REWARDS.get(name, name)
    # What ships is not others' code.
    found = pkgutil.resolve_name(path) if name in REWARDS else resolve(path, RewardError, _called(name))
    if not callable(found):
        raise RewardError(f"{_called(name)}: {path} is a {type(found).__name__}, not a callable")
    return found, _checked_options(name, found, options or {})


def _checked_options(name: str, found: Any, options: Mapping[str, Any]) -> BaseModel | None:
    model = getattr(found, "Options", None) if isinstance(found, type) else None
    if model is None:
        if options:
            raise RewardError(
                f"{_called(name)}: options: {', '.join(options)}: it takes none; a class that does has an attribute "
                "Options, a pydantic model of them"
            )
        return None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise RewardError(f"{_called(name)}: its Options must be a pydantic model")
    with foreign(RewardError, _called(name), name):
        try:
            return validate_section(model, dict(options), "options.")
        except ConfigError as error:
            raise RewardError(f"{_called(name)}: {'; '.join(str(error).splitlines())}") from error


def load_reward(name: str, device: str = "cpu", options: Mapping[str, Any] | None = None) -> Reward:
    """The reward that `name` names (see `find_reward`).

    An object that is a class is instantiated with ``device=device``, and with ``options=`` where it has a model of
    them: that is where a reward with a network finds its weights.

    Raises:
        RewardError: it cannot be found, does not take the options, its class cannot be instantiated, or the instance
            is not callable.
    """
    found, own = find_reward(name, options)
    if isinstance(found, type):
        with foreign(RewardError, _called(name), name):
            found = found(device=device) if own is None else found(device=device, options=own)
        if not callable(found):
            raise RewardError(f"{_called(name)}: its instance is a {type(found).__name__}, not a callable")
    reward: Reward = found
    return reward


def load_spec(spec: RewardSpec, device: str = "cpu") -> Reward:
    """The reward of a configuration, with its options, of frames where it says so.

    Raises:
        RewardError: as of `load_reward`.
    """
    return _of_frames(load_reward(spec.name, device, spec.options), spec)


def _of_frames(reward: Reward, spec: RewardSpec) -> Reward:
    return reward if spec.frames is None else OfFrames(reward, spec.frames)


def load_rewards(specs: Iterable[RewardSpec], device: str = "cpu") -> dict[str, Reward]:
    """The rewards of a configuration by label, each with its options.

    Raises:
        RewardError: as of `load_reward`.
    """
    loaded: dict[str, Reward] = {}
    for spec in specs:
        twin = _twin(loaded.values(), spec)
        loaded[spec.label] = load_spec(spec, device) if twin is None else _of_frames(twin, spec)
    return loaded


def _twin(loaded: Iterable[Reward], spec: RewardSpec) -> Reward | None:
    """One of vipo's own on a network that is loaded already."""
    for other in map(_own_part, loaded):
        if spec.name in REWARDS and (sharing := _own(other, "sharing")) is not None:
            found, options = find_reward(spec.name, spec.options)
            if type(other) is found and (twin := sharing(options)) is not None:
                shared: Reward = twin
                return shared
    return None


def weight_files(reward: Reward) -> list[Path]:
    """The files and folders that a reward of vipo's reads its weights from; of another one nothing is known."""
    files: list[Path] = _own(reward, "weight_files", [])
    return files


def _own(reward: Reward, name: str, missing: Any = None) -> Any:
    """An attribute of a reward of vipo's; of another one it could mean anything."""
    return getattr(reward, name, missing) if type(_own_part(reward)).__module__.startswith("vipo.") else missing


def _own_part(reward: Reward) -> Reward:
    """What scores: of frames, the reward of pictures."""
    return reward.inner if isinstance(reward, OfFrames) else reward


def begin(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Let a reward that computes elsewhere begin with samples that `score` will be called with; others do nothing.

    What is found is the same with and without it.
    """
    if (ahead := _own(reward, "begin")) is not None:
        ahead(images, prompts, metadata)


def identities(rewards: Mapping[str, Reward]) -> dict[str, dict[str, Any]]:
    """What rewards that compute elsewhere tell of themselves, by label: packages, hashes of code and of weights."""
    told = {label: _own(reward, "identity") for label, reward in rewards.items()}
    return {label: identity for label, identity in told.items() if identity is not None}


def check_identities(
    trained: Mapping[str, Mapping[str, Any]], here: Mapping[str, Mapping[str, Any]], record: Path
) -> None:
    """Refuse to measure with another program or other weights than what was trained on.

    Args:
        trained, here: as `identities` gives them; a label that one of them lacks is not compared.
        record: where `trained` was read, for messages.

    Raises:
        RewardError: they differ; the message names in what.
    """
    for label in trained.keys() & here.keys():
        before, now = trained[label], here[label]
        if before == now:
            continue
        parts = [(part, name) for part in now for name in _differing(before.get(part), now[part])]
        told = listed([f"{part} {name}".strip() for part, name in parts], _TOLD)
        raise RewardError(
            f"{_called(label)}: is not the process that {record} tells of: {told}; start that one again, or train again"
        )


def _differing(before: Any, now: Any) -> list[str]:
    if before == now:
        return []
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [""]
    names = sorted(before.keys() | now.keys())
    return [f"{n} ({before.get(n)!s:.40}, now {now.get(n)!s:.40})" for n in names if before.get(n) != now.get(n)]


def _import_path(name: str, reward: Reward) -> str:
    """What tells `foreign` whose code it is: behind a label, the module that the reward is of."""
    module = getattr(_own_part(reward), "__module__", None)
    known = ":" in name or not isinstance(module, str) or module.startswith("vipo.")
    return name if known else f"{module}:{name}"


def _called(name: str) -> str:
    return f"reward {name!r}"


def score(
    name: str, reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Tensor:
    """The scores of `score_where` alone, ``(B,)``."""
    return score_where(name, reward, images, prompts, metadata).scores


def score_where(
    name: str, reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Scored:
    """Score a batch and check what came back.

    The reward gets copies and runs as others' code does (`vipo.foreign.foreign`): whatever it does to them or to the
    process, nothing else sees it.

    Args:
        name: the reward's name or label, for messages.
        reward: as `load_reward` gives it.
        images: ``(B, 3, H, W)``, or videos ``(B, T, 3, H, W)``, float32 in [0, 1].
        prompts: B texts.
        metadata: B mappings, empty where a prompt has none.

    Returns:
        Scores ``(B,)`` float32 on the CPU, without gradient. NaN and infinities are left in place; a picture that is
        itself not finite has no score and gets NaN. And where, ``(B, [T,] h, w)`` float32 on the pictures' device, if
        the reward says so; of a picture that is not finite, zeros.

    Raises:
        ValueError: the arguments do not fit each other.
        RewardError: the reward raised, or returned something other than a dense tensor of shape ``(B,)`` of real
            numbers, alone or with a map of where as `Scored` has it.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or images.dtype != torch.float32:
        raise ValueError(
            "images: expected float32 of shape (B, 3, H, W) or (B, T, 3, H, W), "
            f"got {images.dtype} of {tuple(images.shape)}"
        )
    batch = images.shape[0]
    for argument, values in (("prompts", prompts), ("metadata", metadata)):
        if len(values) != batch:
            raise ValueError(f"{argument}: expected {batch} as in images {tuple(images.shape)}, got {len(values)}")
    finite = images.isfinite().flatten(1).all(dim=1)
    with foreign(RewardError, _called(name), _import_path(name, reward)), torch.no_grad():
        # Copies, for a reward may write into them through a view that nothing here can notice.
        found = reward(images.clone(), list(prompts), copy.deepcopy(list(metadata)))
        scores, where = found if isinstance(found, Scored) else (found, None)
        checked = _checked(name, scores, batch).masked_fill(~finite.cpu(), float("nan"))
        return Scored(checked, None if where is None else _checked_where(name, where, images, finite))


def _checked(name: str, scores: Any, batch: int) -> Tensor:
    if not isinstance(scores, Tensor):
        raise RewardError(f"{_called(name)}: expected a tensor of shape ({batch},), got a {type(scores).__name__}")
    if scores.shape != (batch,):
        raise RewardError(f"{_called(name)}: expected shape ({batch},), got {tuple(scores.shape)}")
    return _plain(name, scores, torch.device("cpu"))


def _checked_where(name: str, where: Any, images: Tensor, finite: Tensor) -> Tensor:
    leading = tuple(images.shape[:-3])
    if not isinstance(where, Tensor):
        raise RewardError(f"{_called(name)}: where: expected a tensor, got a {type(where).__name__}")
    if where.ndim != len(leading) + 2 or where.shape[:-2] != leading or 0 in where.shape:
        wanted = f"({', '.join(map(str, leading))}, h, w)"
        raise RewardError(f"{_called(name)}: where: expected shape {wanted}, got {tuple(where.shape)}")
    checked = _plain(name, where, images.device)
    checked = torch.where(finite.view(-1, *[1] * (checked.ndim - 1)), checked, 0.0)
    if not bool((checked.isfinite() & (checked >= 0)).all()):
        raise RewardError(f"{_called(name)}: where: holds a value that is not finite, or below 0")
    return checked


def _plain(name: str, values: Tensor, device: torch.device) -> Tensor:
    if values.is_complex() or values.is_quantized or values.layout != torch.strided or values.is_meta:
        raise RewardError(
            f"{_called(name)}: expected a dense tensor of real numbers, got {values.dtype}, {values.layout}, on "
            f"{values.device}"
        )
    # Without what a subclass does in its own operations.
    return values.detach().as_subclass(Tensor).to(device, torch.float32)
