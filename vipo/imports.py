"""Import paths of a configuration, tried before anything is computed."""

from vipo.config.objective import SurrogateConfig
from vipo.config.prompts import is_called
from vipo.config.run import Config
from vipo.foreign import is_import_path


def check_imports(config: Config) -> None:
    """Import what a configuration names by import path: prompt source, generator, backbone, credit sources, objective,
    gate, rewards, trackers; options of those are checked by the parts themselves.

    Registered names need no trial, and nothing is imported for them; of trackers, whether their package is there.

    Raises:
        VipoError: of the part's own kind; one cannot be imported, or is not what it should be.
    """
    for key, source in config.prompts.sources.items():
        if is_called(source):
            from vipo.prompts.sources import find_source

            find_source(source, f"prompts.{key}".removesuffix(".source"))
    if is_import_path(config.generator.family):
        from vipo.generators.configured import resolve_class

        resolve_class(config.generator)
    if is_import_path(config.perception.backbone):
        from vipo.perception.loading import find_backbone

        find_backbone(config.perception.backbone)
    if any(is_import_path(name) for name in config.credit.names):
        from vipo.credit import load_sources

        load_sources(config.credit)
    gate = config.objective.gate.name if isinstance(config.objective, SurrogateConfig) else ""
    if is_import_path(config.objective.name) or is_import_path(gate):
        from vipo.objectives import load_objective

        load_objective(config.objective)
    for reward in (*config.reward.terms, *config.evaluation.rewards):
        if is_import_path(reward.name):
            from vipo.rewards import find_reward

            find_reward(reward.name, reward.options)
    if config.tracking.trackers:
        from vipo.tracking.trackers import check_tracker

        for name in config.tracking.trackers:
            check_tracker(name)
