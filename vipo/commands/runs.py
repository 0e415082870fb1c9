"""Commands up to a trained run: `vipo config` to `vipo check`, and `vipo base`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vipo.commands.options import RESULTS, ConfigFile, Overrides, Results, Wait, checked, say
from vipo.config.compose import dump_config, load_config, load_generator_sections, repository_root
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.imports import check_imports


def config(
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a configuration instead.")] = False,
    schemas: Annotated[
        Path | None, typer.Option("--schemas", help="Write what editors check files of configs/ by into this folder.")
    ] = None,
) -> None:
    """Print the resolved, validated configuration as YAML."""
    if schemas is not None:
        from vipo.config.schemas import write_editor_schemas

        for path in write_editor_schemas(schemas):
            say(path)
    elif schema:
        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
    else:
        typer.echo(dump_config(checked(overrides, None)), nl=False)


def prepare(overrides: Overrides = None, file: ConfigFile = None, results: Results = RESULTS, wait: Wait = 0) -> None:
    """Clean, deduplicate and split the prompts into results/<experiment>/prompts."""
    from vipo.config.experiment import arms_beside
    from vipo.stages import prepare_stage

    chosen = checked(overrides, file)
    readers = () if file is None else arms_beside(file, chosen)[1:]
    for reader in readers:
        check_imports(reader)
    prepare_stage(chosen, repository_root(), results, wait, readers)


def encode(overrides: Overrides = None, file: ConfigFile = None, results: Results = RESULTS, wait: Wait = 0) -> None:
    """Encode the prepared prompts with the generator's text encoders."""
    from vipo.stages import encode_stage

    encode_stage(checked(overrides, file), repository_root(), results, wait)


def train(overrides: Overrides = None, file: ConfigFile = None, results: Results = RESULTS, wait: Wait = 0) -> None:
    """Train one run (one arm, one seed); a killed run goes on where it stopped.

    Prompts and embeddings are made first where the results folder lacks them.
    """
    from vipo.stages import train_stage

    train_stage(checked(overrides, file), repository_root(), results, wait)


def plan(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = RESULTS,
    memory: Annotated[
        float | None, typer.Option(min=0, max=1e9, help="GiB of a device; more is an error that says what would fit.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e9, help="TFLOP/s that all processes together reach: seconds an update."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Count a run's memory, network evaluations and disk before it is started; reads no weights."""
    from vipo.prompts import read_prompts
    from vipo.training.fit import require_fit
    from vipo.training.plan import plan as planned
    from vipo.training.setup import prompts_path

    chosen, root = checked(overrides, file), repository_root()
    prepared = prompts_path(results / chosen.experiment.name)
    # Before `prepare` nobody knows how many there are: those of one update then.
    prompts = len(read_prompts(prepared)) if prepared.is_file() else chosen.training.prompts_per_update
    found = planned(chosen, root, prompts)
    typer.echo(json.dumps(found.as_json(), indent=2) if as_json else found.text(tflops))
    if memory is not None:
        require_fit(chosen, root, prompts, found, memory * 2**30)


def check_generator(
    overrides: Overrides = None,
    height: Annotated[int, typer.Option(min=1, help="Of the compared pictures, in pixels.")] = 128,
    width: Annotated[int, typer.Option(min=1, help="Likewise.")] = 192,
    frames: Annotated[int, typer.Option(min=1, help="Likewise, where the family makes videos.")] = 9,
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Of the compared sample.")] = 4,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Two or more; default: two short ones.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="A check to leave out, such as update_full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare a generator's adapter with its stock pipeline on the configured checkpoint; status 1 where one fails.

    Section generator says which (generator=NAME, generator.path=...), but for its size; training.lora what LoRA adapts.
    The network is held in fp32, for update_full and gradients with its gradients and AdamW: 16 bytes a weight.
    """
    from vipo.conformance.command import compare

    results = compare(
        *load_generator_sections(overrides or []),
        repository_root(),
        size=(height, width, frames),
        steps=steps,
        prompts=prompts,
        without=without or (),
        said=(lambda _: None) if as_json else say,
    )
    if as_json:
        typer.echo(json.dumps([vars(found) for found in results], indent=2))
    if any(found.result == "fails" for found in results):
        raise typer.Exit(1)


def check(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = RESULTS,
    online: Annotated[bool, typer.Option("--online", help="Ask the hub too: access, commits, sizes.")] = False,
    pin: Annotated[
        Path | None,
        typer.Option("--pin", metavar="FILE", help="Write commits that are not named yet into this file."),
    ] = None,
    branch: Annotated[str, typer.Option("--branch", help="Whose commits --pin writes.")] = "main",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Look at all that an experiment needs before it starts: a line each, ok or what to do (exit status 1)."""
    from vipo.check.commands import check_command

    lines = check_command(overrides, file, results, online=online, pin=pin, branch=branch)
    if as_json:
        typer.echo(json.dumps([line.as_json() for line in lines], indent=2))
    else:
        width = max(len(line.subject) for line in lines)
        typer.echo("\n".join(line.text(width) for line in lines))
    if any(line.verdict == "to do" for line in lines):
        raise typer.Exit(1)


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
    from vipo.stages import base_stage

    base_stage(chosen.pretrain, repository_root(), output)
