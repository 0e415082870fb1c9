"""What the configurations of an experiment's runs must agree on, known before any of them starts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from vipo.config.compose import load_config_file
from vipo.config.generator import GeneratorConfig
from vipo.config.registries import CLIP_REWARDS, PICTURE_REWARDS, SCENE_REWARDS
from vipo.config.reward import RewardSpec
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.config.values import divisors

# What a report compares arms on.
_SHARED = ("reward", "evaluation")


def check_runs(runs: Mapping[str, Config]) -> None:
    """Refuse an experiment that would be trained and could then not be evaluated or reported.

    Args:
        runs: every run of the experiment, by name.

    Raises:
        ConfigError: nothing is held out, arms differ in reward or evaluation, there is nothing but the base, or a run
            cannot work (see `check_run`); the message names the run and the key.
    """
    first, *others = runs.items()
    for name, config in runs.items():
        if not config.prompts.holds_out:
            raise ConfigError("prompts.eval_share: 0 holds no prompt out, and every run is evaluated; raise it")
        try:
            check_run(config)
        except ConfigError as error:
            raise ConfigError(f"run {name}: {error}") from error
    for name, config in others:
        for section in _SHARED:
            if getattr(config, section) != getattr(first[1], section):
                raise ConfigError(
                    f"run {name}: its arm's overrides change section {section}; the report compares all runs on one, "
                    "so make it another experiment"
                )
    if all(config.is_base for config in runs.values()):
        raise ConfigError("experiment.arms: there is no arm but 'base', so nothing to compare it with; add one")


def arms_beside(file: Path, config: Config) -> list[Config]:
    """One run of each arm of an experiment, as the workflow writes them beside each other.

    Args:
        file: where `config` was read, ``<run>.yaml``.
        config: any run of the experiment; `config` itself is among the result.

    Raises:
        ConfigError: one of them cannot be read.
    """
    runs = {name: f"{name}-s{arm.seeds[0]}" for name, arm in config.experiment.arms.items() if name != config.arm}
    others = [path for run in runs.values() if (path := file.with_name(f"{run}.yaml")).is_file()]
    return [config, *(load_config_file(path) for path in others)]


def configured_arms(file: Path, config: Config, names: Sequence[str]) -> dict[str, Config]:
    """The configurations beside a file (see `arms_beside`) of the arms that are named, in that order.

    Raises:
        ConfigError: one of them is not there.
    """
    found = {own.arm: own for own in arms_beside(file, config)}
    if missing := [name for name in names if name not in found]:
        raise ConfigError(
            f"experiment.meter.arms: {', '.join(missing)}: no resolved configuration beside {file}; add them to "
            "experiment.arms, or give overrides instead of --config"
        )
    return {name: found[name] for name in names}


def check_run(config: Config) -> None:
    """Refuse what the configuration alone says that a run will not be able to do.

    Raises:
        ConfigError: see `check_pictures` and, of a trained run, `check_processes` and `check_solver`.
    """
    check_pictures(config)
    if not config.is_base:
        check_processes(config)
        check_solver(config)


def check_solver(config: Config) -> None:
    """Refuse step credit around a window whose other steps are not Euler's.

    Raises:
        ConfigError: it reads a step's prediction off what Euler's step made of it.
    """
    if config.credit.steps != "none" and config.sampling.solver != "euler":
        raise ConfigError(
            f"credit.steps {config.credit.steps!r}: it follows Euler's steps, and sampling.window.solver is "
            f"{config.sampling.solver!r}; set that to euler"
        )


def check_processes(config: Config) -> None:
    """Refuse micro-batches that do not divide among the processes.

    Raises:
        ConfigError: the message names what may be chosen.
    """
    training, processes = config.training, config.distribution.world_size
    per_step = training.samples_per_step()
    for name, samples in per_step.items():
        batches = samples // training.micro_batch
        if batches % processes:
            common = math.gcd(*per_step.values())
            offered = (
                f"training.micro_batch may be {divisors(common // processes)}"
                if common % processes == 0
                else f"processes in all may be {divisors(common // training.micro_batch)}"
            )
            raise ConfigError(
                f"training.{name}: the {batches} micro-batches of an optimizer step do not divide among {processes} "
                f"processes; change training.micro_batch or distribution.processes: {offered}"
            )


def check_pictures(config: Config) -> None:
    """Refuse rewards and maps that cannot read the pictures or videos that the configuration asks for.

    Raises:
        ConfigError: the message names the key.
    """
    video = config.generator.frames is not None
    if "oracle" in config.credit.names and video:
        raise ConfigError("credit.sources: 'oracle' needs drawn pictures; generator.frames asks for videos")
    named: Sequence[tuple[str, RewardSpec, GeneratorConfig]] = [
        *(("reward.terms", term.spec, config.generator) for term in config.reward.terms),
        *(("evaluation.rewards", reward, config.evaluated) for reward in config.evaluation.rewards),
    ]
    for key, reward, generator in named:
        name = reward.name
        if name in PICTURE_REWARDS and video and reward.frames is None:
            raise ConfigError(
                f"{key}: reward {name!r} takes pictures, generator.frames asks for videos; set the reward's frames, "
                "say to 4, for the mean over so many of them"
            )
        if reward.frames is not None and (not video or name in CLIP_REWARDS | SCENE_REWARDS):
            why = "scores no single frames" if video else "scores pictures, generator.frames is null"
            raise ConfigError(f"{key}: reward {name!r} {why}; leave its frames out")
        if name in CLIP_REWARDS and (generator.frames or 1) < 2:
            raise ConfigError(f"{key}: reward {name!r} takes videos of two frames or more; generator.frames makes them")
        if name in SCENE_REWARDS and (video or (generator.height, generator.width) != (64, 64)):
            made = "videos" if video else f"{generator.height}x{generator.width}"
            raise ConfigError(
                f"{key}: reward {name!r} reads drawn pictures of 64x64 pixels, the generator's samples are {made}"
            )
