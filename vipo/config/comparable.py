"""What `vipo credit` can measure beside each other."""

from collections.abc import Mapping

from vipo.config.objective import SurrogateConfig
from vipo.config.run import Config
from vipo.config.validation import ConfigError

# What all arms must share for their directions to be comparable.
_SHARED = ("generator", "prompts", "reward", "sampling", "optimizer", "training", "advantages", "seed")


def check_comparable(configs: Mapping[str, Config]) -> SurrogateConfig:
    """Refuse arms that differ in more than their credit, or that cannot be measured.

    Returns:
        The first one's objective.

    Raises:
        ConfigError: naming the arm and the key.
    """
    if untrained := [name for name, config in configs.items() if config.is_base]:
        raise ConfigError(f"experiment.meter.arms: {untrained[0]!r} is not trained and has no direction; leave it out")
    (first_name, first), *others = configs.items()
    for name, config in others:
        differing = [key for key in _SHARED if getattr(config, key) != getattr(first, key)]
        if differing:
            raise ConfigError(
                f"experiment.meter.arms: {name!r} differs from {first_name!r} in more than its credit "
                f"({', '.join(differing)}), so their directions cannot be compared; leave it out"
            )
    surrogates = {
        name: config.objective for name, config in configs.items() if isinstance(config.objective, SurrogateConfig)
    }
    for name, config in configs.items():
        if name not in surrogates:
            raise ConfigError(
                f"experiment.meter.arms: {name!r} has the objective {config.objective.name!r}, whose gradient is not "
                "the surrogate's that is measured; leave it out"
            )
    for name, objective in surrogates.items():
        if objective.ratio_norm != "none":
            raise ConfigError(
                f"experiment.meter.arms: {name!r} weights its steps by objective.ratio_norm {objective.ratio_norm!r}, "
                "which is not measured; leave it out, or set that to none"
            )
        if objective.density != surrogates[first_name].density:
            raise ConfigError(
                f"experiment.meter.arms: {name!r} has objective.density {objective.density!r} and {first_name!r} "
                f"{surrogates[first_name].density!r}, so their directions cannot be compared; leave it out"
            )
    if first.sampling.solver != "euler":
        raise ConfigError(
            f"sampling.window.solver {first.sampling.solver!r}: the meter's gradients follow Euler's steps; set it to "
            "euler"
        )
    return surrogates[first_name]
