"""Hydra composition, and files of resolved configurations."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vipo.config.arms import ArmConfig, check_arm_name
from vipo.config.generator import GeneratorConfig
from vipo.config.resolved import MOST_BYTES, from_yaml, read_mapping, to_yaml
from vipo.config.run import Config
from vipo.config.training import TrainingConfig
from vipo.config.validation import ConfigError, cut, validate_section
from vipo.config.values import flattened
from vipo.regular import read_regular

_ASSIGNMENT = re.compile(r"(\w+)(\.\w+)*=")
_WHOLE_PART = re.compile(r"(objective(?:\.gate)?)=\{\s*name\s*:")
_AT_HOME = re.compile(r"(\+{0,2}[\w.]+=)(~[\w.-]*/[^'\"]*)")


def repository_root() -> Path:
    """The folder that holds vipo's `configs/`: the working directory, or the checkout that this package is in.

    Another Hydra project has a ``configs/config.yaml`` as well, but no ``configs/arm/base.yaml``.

    Raises:
        ConfigError: neither has one.
    """
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if all((root / "configs" / name).is_file() for name in ("config.yaml", "arm/base.yaml")):
            return root
    raise ConfigError(
        f"no configs/config.yaml with configs/arm/base.yaml in {Path.cwd()}: run vipo from a checkout of the repository"
    )


def load_config(overrides: Sequence[str]) -> Config:
    """Compose `configs/` with Hydra overrides and validate the result.

    The chosen arm's own overrides (``experiment.arms.<arm>.overrides``) are applied before the caller's.

    Raises:
        ConfigError: an unknown group, key or arm, a wrong type or an impossible combination.
    """
    name = next((text.removeprefix("arm=") for text in reversed(overrides) if text.startswith("arm=")), None)
    rest = [text for text in overrides if not text.startswith("arm=")]
    if name is not None:
        _check_arm(name)
    if name is None or (repository_root() / "configs" / "arm" / f"{name}.yaml").is_file():
        file = [f"arm={name}"] if name is not None else []
        data = _compose([*file, *rest])
    else:
        # Not a file's name: an arm that the experiment derives from one.
        file = [f"arm={_arm(_compose(rest), name).base or name}"]
        data = _compose([*file, *rest])
        data["arm"] = name
    own = _arm(data, data.get("arm")).overrides
    if own:
        data = _compose([*file, *own, *rest]) | {"arm": data.get("arm")}
    return validate_config(data)


def load_generator_sections(overrides: Sequence[str]) -> tuple[GeneratorConfig, TrainingConfig]:
    """Sections `generator` and `training` alone, which need not fit an experiment's rewards and sampling.

    Raises:
        ConfigError: an unknown group or key, or a wrong type.
    """
    named = any(text.startswith("experiment=") for text in overrides)
    data = _compose([*([] if named else ["experiment=demo"]), *overrides])
    return (
        validate_section(GeneratorConfig, data["generator"], "generator."),
        validate_section(TrainingConfig, data["training"], "training."),
    )


def _check_arm(name: str) -> None:
    try:
        check_arm_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _arm(data: dict[str, Any], name: Any) -> ArmConfig:
    experiment = data.get("experiment")
    arms = experiment.get("arms") if isinstance(experiment, dict) else None
    # What is no mapping of arms is for the validation of the whole to name.
    chosen = arms.get(name) if isinstance(arms, dict) else None
    return validate_section(ArmConfig, chosen or {}, f"experiment.arms.{name}.")


def load_config_file(path: Path) -> Config:
    """Read a resolved configuration file as `dump_config` writes it. It is data: nothing in it is interpolated.

    Raises:
        ConfigError: the file is missing, no regular file, too large, not YAML, holds aliases, or does not validate.
    """
    try:
        data = read_mapping(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return validate_config(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def configuration(overrides: Sequence[str] | None, file: Path | None) -> Config:
    """The configuration that a command's overrides or its ``--config FILE`` choose.

    Raises:
        ConfigError: both are given, or as of `load_config` and `load_config_file`.
    """
    if file is None:
        return load_config(overrides or [])
    if overrides:
        raise ConfigError(f"give overrides or --config {file}, not both: a resolved file is complete")
    return load_config_file(file)


def validate_config(data: Any) -> Config:
    """Validate plain data against `Config`.

    Raises:
        ConfigError: one line per problem with key, value and what is allowed; or it is larger than what
            `load_config_file` reads.
    """
    config = validate_section(Config, data)
    # In YAML it is longer than in JSON, by less than this factor.
    if len(config.model_dump_json()) > MOST_BYTES // 16 and (size := len(dump_config(config).encode())) > MOST_BYTES:
        lengths = {key: len(str(value)) for key, value in flattened(config.model_dump(mode="json"))}
        longest = max(lengths, key=lambda key: lengths[key])
        raise ConfigError(
            f"{longest}: has {lengths[longest]} characters, and the configuration {size} bytes; the {MOST_BYTES} of a "
            "saved one are read again; shorten it"
        )
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, complete and in a fixed order."""
    return to_yaml(config.model_dump(mode="json"))


def write_if_changed(path: Path, text: str) -> bool:
    """Write `text` unless the file holds it already (so that its time stamp triggers nothing); True if written."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def write_if_missing(path: Path, text: str) -> bool:
    """Write `text` unless there is a file, whatever it holds and whoever makes it meanwhile; True if written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    return True


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    folder = repository_root() / "configs"
    _check_files(folder)
    try:
        with initialize_config_dir(str(folder), version_base="1.3", job_name="vipo"):
            composed = compose("config", overrides=[said for text in overrides for said in _admitted(text, folder)])
        data = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; give it a value") from error
    except OverrideParseException as error:
        text = error.override.removeprefix("++")
        reason = _readable(str(error)).removeprefix(f"Error parsing override '{error.override}' ")
        raise ConfigError(
            f"override {cut(repr(text))} cannot be read: {cut(reason)}; write key=value, with what holds colons or "
            "brackets in quotes"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_readable(str(error))) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder}: a file is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{folder}, or an override, is nested too deeply to be read") from error
    # Hydra's plain ValueErrors and OverflowErrors name no override.
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{error} (overrides: {cut(' '.join(overrides))})") from error
    if not isinstance(data, dict):
        raise ConfigError("configs/config.yaml holds no mapping")
    section = data.get("experiment")
    if isinstance(section, dict) and "experiment" in section:
        name = next((text.removeprefix("experiment=") for text in overrides if text.startswith("experiment=")), "NAME")
        raise ConfigError(
            f"configs/experiment/{name}.yaml: all of it was read as part of section 'experiment'; its first line must "
            "be '# @package _global_'"
        )
    return {str(key): value for key, value in data.items()}


def _check_files(folder: Path) -> None:
    """Refuse what Hydra would never end to read: no regular file, or copies of copies by alias."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            data = read_regular(path, MOST_BYTES)
            # No alias without an anchor, and no text called a number without a tag; the rest Hydra judges.
            if b"&" in data or b"!!" in data:
                from_yaml(data)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error


def _admitted(override: str, folder: Path) -> list[str]:
    # Defaults live in the models, so a key that no YAML file names is still a valid one: `++` lets it in,
    # and validation, which knows all keys, judges it. The choice of a group's file stays as it is.
    if home := _AT_HOME.fullmatch(override):
        # No word of Hydra's grammar begins with `~`.
        override = f"{home[1]}'{home[2]}'"
    assignment = _ASSIGNMENT.match(override)
    # Hydra merges mappings; what begins with the name of a part has no use for the options of the one before it.
    if part := _WHOLE_PART.match(override):
        return [f"++{part[1]}=null", f"++{override}"]
    chooses_file = assignment and not assignment[2] and (folder / assignment[1]).is_dir()
    return [f"++{override}" if assignment and not chooses_file else override]


def _readable(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = ("full_key", "object_type", "Set the environment", "See https", "Config search path", "provider=")
    return " ".join(line for line in lines if not line.startswith(noise))
