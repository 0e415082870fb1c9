"""Import paths of a configuration, tried before anything is computed."""

from vipo.config.run import Config
from vipo.foreign import is_import_path


def check_imports(config: Config) -> None:
    """Import what a configuration names by import path: prompt source, generator, backbone, rewards.

    Registered names need no trial, and nothing is imported for them.

    Raises:
        VipoError: of the part's own kind; one cannot be imported, or is not what it should be.
    """
    if is_import_path(config.prompts.source):
        from vipo.prompts.sources import find_source

        find_source(config.prompts.source)
    if is_import_path(config.generator.family):
        from vipo.generators.base import resolve_class

        resolve_class(config.generator)
    if is_import_path(config.perception.backbone):
        from vipo.perception.backbones import find_backbone

        find_backbone(config.perception.backbone)
    for reward in (*config.reward.terms, *config.evaluation.rewards):
        if is_import_path(reward.name):
            from vipo.rewards import find_reward

            find_reward(reward.name, reward.options)
