"""The commands by name, and how one ends. What each does is in `vipo.commands`."""

import os
import re
import sys
from collections.abc import Callable

import typer

from vipo.commands.evaluation import compare, credit, evaluate, sample
from vipo.commands.results import audit, crate, diff, export, published, registered, report, study, summarize, upload
from vipo.commands.rewards import score_beside, serve_reward
from vipo.commands.runs import base, check, check_generator, config, encode, plan, prepare, train
from vipo.ending import Commands, end_plainly, end_process
from vipo.maps.commands import map_command, orientation
from vipo.runtime import settle_runtime

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-train image generators with Visual Preference Policy Optimization (ViPO), reproducibly.\n\n"
    "Every stage takes Hydra overrides (experiment=demo arm=vipo seed=1 optimizer.learning_rate=1e-4) "
    "or a resolved configuration file (--config), reads files under results/ and writes files there.",
)
# In the order of `vipo --help`; typer names each as its function, with `-` for `_`.
_COMMANDS: tuple[Callable[..., None], ...] = (
    *(config, prepare, encode, train, plan, check_generator, check),
    *(evaluate, compare, sample, summarize, report, credit, study, registered, published, crate),
    *(serve_reward, score_beside, map_command, orientation),
    *(base, diff, export, upload, audit),
)
for _command in _COMMANDS:
    app.command("map" if _command is map_command else None)(_command)

_HOME = re.compile(r"(--[\w-]+=|-\w)?(~|~[\w.-]*/.*)", re.DOTALL)


def _expanded(argument: str) -> str:
    # A shell leaves `--results=~/x` as it is. What has no slash is one of Hydra's deletions, but for `~` alone.
    found = _HOME.fullmatch(argument)
    return f"{found[1] or ''}{os.path.expanduser(found[2])}" if found else argument  # noqa: PTH111


def main() -> None:
    """Entry point: errors that a user can mend are printed without a traceback, with exit status 1 (75: preempted)."""
    settle_runtime()
    end_plainly(lambda: app([_expanded(argument) for argument in sys.argv[1:]]))


def command() -> None:
    """`main` of a process that has nothing else to do: it ends with it."""
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
        end_process()


if __name__ == "__main__":
    command()
