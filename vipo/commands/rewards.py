"""`vipo serve-reward` and `vipo score-beside`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vipo.commands.options import say
from vipo.config.validation import ConfigError


def serve_reward(
    name: Annotated[str, typer.Argument(help="A registered reward, or an import path 'package.module:object'.")],
    arguments: Annotated[str, typer.Option(help="Its options, as JSON.")] = "{}",
    device: Annotated[str, typer.Option(help="Where it computes: cpu, cuda, cuda:1.")] = "cpu",
    host: Annotated[str, typer.Option(help="Where it listens; others than this machine need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one, told on standard output.")] = 0,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the token.")
    ] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", help="End when standard input does.")] = False,
) -> None:
    """Answer other processes' questions for a reward's scores over HTTP (docs/reward_process.md)."""
    from vipo.rewards.serving import serve_reward as serve

    serve(name, arguments, device, host, port, token_env, with_parent=with_parent)


def score_beside(
    name: Annotated[str, typer.Argument(help="A reward of ours, such as hpsv2.")],
    pictures: Annotated[list[Path], typer.Argument(help="Picture files; of several frames, a clip.")],
    prompts: Annotated[list[str], typer.Option("--prompt", help="One for all pictures, or one each.")],
    environment: Annotated[
        str | None, typer.Option(help="Virtual environment of its own package; default: envs/PACKAGE.")
    ] = None,
    original: Annotated[
        str | None, typer.Option(metavar="MODULE:OBJECT", help="What is served there; known for hpsv2 and the like.")
    ] = None,
    options: Annotated[str, typer.Option(help="Our reward's options, as JSON.")] = "{}",
    arguments: Annotated[str, typer.Option(help="The original's, as JSON.")] = "{}",
    device: Annotated[str, typer.Option(help="Where both compute.")] = "cpu",
) -> None:
    """Score pictures with a reward of ours and with its authors' own package, side by side."""
    from vipo.rewards.beside import score_beside as beside

    try:
        own, theirs = json.loads(options), json.loads(arguments)
    except ValueError as error:
        raise ConfigError(f'--options and --arguments are JSON such as \'{{"path": "weights/x"}}\': {error}') from error
    if not (isinstance(own, dict) and isinstance(theirs, dict)):
        raise ConfigError('--options and --arguments are objects of JSON, such as \'{"path": "weights/x"}\'')
    process: dict[str, Any] = {"arguments": theirs}
    if environment is not None:
        process["environment"] = environment
    if original is not None:
        process |= {"environment": environment or f"envs/{name}", "reward": original}
    say(beside(name, own, process, pictures, prompts, device).text())
