"""Options that many commands have, and the configuration that they choose."""

from pathlib import Path
from typing import Annotated

import typer

from vipo.config.compose import configuration
from vipo.config.run import Config
from vipo.ending import Place
from vipo.imports import check_imports
from vipo.text import visible


def _noted(ctx: typer.Context, results: Path) -> Path:
    ctx.ensure_object(Place).results = results
    return results


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Hydra overrides: experiment=demo arm=vipo seed=1 section.key=value."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A resolved configuration file, instead of overrides.")
]
Results = Annotated[
    Path, typer.Option("--results", callback=_noted, help="Folder that holds all experiments' results.")
]
Wait = Annotated[
    float,
    typer.Option(
        "--wait",
        min=0,
        envvar="VIPO_WAIT",
        help="Seconds to wait for another process that writes the same files; 0 stops at once.",
    ),
]

RESULTS = Path("results")


def checked(overrides: list[str] | None, file: Path | None) -> Config:
    """The configuration of a stage that runs what it names: import paths are tried."""
    config = configuration(overrides, file)
    check_imports(config)
    return config


def say(text: object) -> None:
    """A line on standard output, without characters that a terminal would obey."""
    typer.echo(visible(str(text)))
