"""Commands; nothing else. Heavy libraries are imported inside the commands that need them."""

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from vipo.config.compose import ConfigError, dump_config, load_config, load_config_file, repository_root
from vipo.config.models import Config, PerceptionConfig
from vipo.errors import Preempted, VipoError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-train image generators with Visual Preference Policy Optimization (ViPO), reproducibly.\n\n"
    "Every stage takes Hydra overrides (experiment=demo arm=vipo seed=1 optimizer.learning_rate=1e-4) "
    "or a resolved configuration file (--config), reads files under results/ and writes files there.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Hydra overrides: experiment=demo arm=vipo seed=1 section.key=value."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A resolved configuration file, instead of overrides.")
]
Results = Annotated[Path, typer.Option("--results", help="Folder that holds all experiments' results.")]

_RESULTS = Path("results")


def _configuration(overrides: list[str] | None, file: Path | None) -> Config:
    if file is None:
        return load_config(overrides or [])
    if overrides:
        raise ConfigError(f"give overrides or --config {file}, not both: a resolved file is complete")
    return load_config_file(file)


@app.command()
def config(
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a configuration instead.")] = False,
) -> None:
    """Print the resolved, validated configuration as YAML."""
    if schema:
        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
    else:
        typer.echo(dump_config(load_config(overrides or [])), nl=False)


@app.command()
def prepare(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS) -> None:
    """Clean, deduplicate and split the prompts into results/<experiment>/prompts."""
    from vipo.stages import prepare_stage

    prepare_stage(_configuration(overrides, file), repository_root(), results)


@app.command()
def encode(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS) -> None:
    """Encode the prepared prompts with the generator's text encoders."""
    from vipo.stages import encode_stage

    encode_stage(_configuration(overrides, file), repository_root(), results)


@app.command()
def train(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS) -> None:
    """Train one run (one arm, one seed); a killed run goes on where it stopped.

    Prompts and embeddings are made first where the results folder lacks them.
    """
    from vipo.stages import train_stage

    train_stage(_configuration(overrides, file), repository_root(), results)


@app.command()
def evaluate(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS) -> None:
    """Sample the held-out prompts with one run's weights and score them with all rewards."""
    from vipo.stages import evaluate_stage

    evaluate_stage(_configuration(overrides, file), repository_root(), results)


@app.command()
def report(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS) -> None:
    """Build the experiment's HTML report from all its runs."""
    from vipo.stages import report_stage

    typer.echo(report_stage(_configuration(overrides, file), repository_root(), results))


@app.command()
def study(
    experiments: Annotated[list[str], typer.Argument(help="Experiments; the first one's section `study` decides.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables, figures and the page.")],
    results: Results = _RESULTS,
) -> None:
    """Put a study together from its experiments' results: tables, figures, the decision on the default."""
    from vipo.stages import study_stage

    configs = [load_config([f"experiment={name}", "arm=base"]) for name in experiments]
    typer.echo(study_stage(configs, results, output))


@app.command()
def crate(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS) -> None:
    """Describe the experiment as an RO-Crate: files, runs, parameters, software."""
    from vipo.stages import crate_stage

    typer.echo(crate_stage(_configuration(overrides, file), repository_root(), results))


@app.command("map")
def map_command(
    images: Annotated[list[Path], typer.Argument(help="Pictures to map.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png file for one picture, a folder for several.")],
    backbone: Annotated[
        str, typer.Option(help="'efficientnet_lite0' (packaged), any timm name, or an import path.")
    ] = "efficientnet_lite0",
    weights: Annotated[
        str | None, typer.Option(help="Local weights (safetensors file or folder) of a timm backbone.")
    ] = None,
    orientation: Annotated[
        str | None, typer.Option(help="norm, centre, border, skew or none; default: the backbone's own.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Feature stage or block; default: the backbone's own.")] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Shorter side in pixels fed to the backbone; 224 suits photographs.")
    ] = None,
    components: Annotated[int, typer.Option(help="K, the number of principal directions.")] = 3,
    smoothing: Annotated[float, typer.Option(help="Gaussian sigma on the patch grid; 0 turns it off.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Draw the allocation map over any picture: where ViPO would send the credit."""
    from vipo.config.compose import validate_section

    chosen = validate_section(
        PerceptionConfig,
        {
            "backbone": backbone,
            "weights": weights,
            "orientation": orientation,
            "layer": layer,
            "input_size": input_size,
            "components": components,
            "smoothing": smoothing,
        },
    )
    from vipo.perception.show import map_images

    for path in map_images(images, output, chosen, device):
        typer.echo(path)


@app.command()
def base(
    overrides: Overrides = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the generator, in the diffusers layout.")
    ] = Path("results/base"),
) -> None:
    """Rebuild the demo generator from drawn scenes (section `pretrain`; resumable)."""
    chosen = load_config(overrides or [])
    if chosen.pretrain is None:
        raise ConfigError(
            f"experiment {chosen.experiment.name!r} has no section 'pretrain': its generator was not built here"
        )
    from vipo.training.pretrain import train_base

    train_base(chosen.pretrain, output, output.with_name(f".{output.name}.work"))


def main() -> None:
    """Entry point: errors that a user can mend are printed without a traceback, with exit status 1 (75: preempted)."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "matplotlib", "fontTools", "timm"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except VipoError as error:
        # Whoever read the messages may have been killed with the job; the exit status still counts.
        with contextlib.suppress(BrokenPipeError):
            typer.echo(f"error: {error}", err=True)
        # A scheduler tells by it what can be tried again: EX_TEMPFAIL of sysexits.h.
        sys.exit(75 if isinstance(error, Preempted) else 1)
    except OSError as error:
        typer.echo(f"error: {error}; check that the path exists, permissions and free space", err=True)
        sys.exit(1)
