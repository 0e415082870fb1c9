"""Rewards that are asked over HTTP: what vipo starts must be there, what runs elsewhere needs its token."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vipo.check.line import Line, not_known, ok, to_do
from vipo.config.reward import RewardSpec
from vipo.config.reward_process import ASKED
from vipo.config.run import Config


def asked_lines(configs: Sequence[Config], root: Path) -> Iterator[Line]:
    """A line for each such reward of some runs, trained or measured; no connection is opened.

    Raises:
        RewardError: an environment is not there.
    """
    specs = [spec for own in configs for spec in (*own.reward.terms, *own.evaluation.rewards) if spec.name in ASKED]
    for spec in {spec.identity: spec for spec in specs}.values():
        yield _line(spec, root)


def _line(spec: RewardSpec, root: Path) -> Line:
    # Only here, for it loads torch.
    from vipo.rewards.child import python_of

    subject, options = f"reward {spec.title}", spec.options
    if (environment := options.get("environment")) is not None:
        return ok(subject, f"{python_of(str(environment), root)} starts it")
    variable = options.get("token_env")
    if variable is not None and str(variable) not in os.environ:
        return to_do(subject, f"the environment has no {variable}; put the token there")
    return not_known(subject, f"{options['url']} is asked when a stage starts")
