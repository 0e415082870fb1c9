"""Commands; nothing else. Heavy libraries are imported inside the commands that need them."""

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vipo.config.compose import (
    dump_config,
    load_config,
    load_config_file,
    load_generator_sections,
    repository_root,
)
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.ending import Commands, Place, end_plainly
from vipo.imports import check_imports
from vipo.maps.commands import map_command, orientation
from vipo.text import visible

log = logging.getLogger(__name__)


def _noted(ctx: typer.Context, results: Path) -> Path:
    ctx.ensure_object(Place).results = results
    return results


app = typer.Typer(
    cls=Commands,
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

Part = Annotated[
    str | None,
    typer.Option("--share", metavar="N/COUNT", help="This part of the work alone; without it, what is missing."),
]

_RESULTS = Path("results")
_HOME = re.compile(r"(--[\w-]+=|-\w)?(~|~[\w.-]*/.*)", re.DOTALL)


def _configuration(overrides: list[str] | None, file: Path | None) -> Config:
    if file is None:
        return load_config(overrides or [])
    if overrides:
        raise ConfigError(f"give overrides or --config {file}, not both: a resolved file is complete")
    return load_config_file(file)


def _checked(overrides: list[str] | None, file: Path | None) -> Config:
    """The configuration of a stage that runs what it names: import paths are tried."""
    config = _configuration(overrides, file)
    check_imports(config)
    return config


def _say(text: object) -> None:
    typer.echo(visible(str(text)))


@app.command()
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
            _say(path)
    elif schema:
        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
    else:
        typer.echo(dump_config(_checked(overrides, None)), nl=False)


@app.command()
def prepare(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS, wait: Wait = 0) -> None:
    """Clean, deduplicate and split the prompts into results/<experiment>/prompts."""
    from vipo.config.experiment import arms_beside
    from vipo.stages import prepare_stage

    chosen = _checked(overrides, file)
    readers = () if file is None else arms_beside(file, chosen)[1:]
    for reader in readers:
        check_imports(reader)
    prepare_stage(chosen, repository_root(), results, wait, readers)


@app.command()
def encode(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS, wait: Wait = 0) -> None:
    """Encode the prepared prompts with the generator's text encoders."""
    from vipo.stages import encode_stage

    encode_stage(_checked(overrides, file), repository_root(), results, wait)


@app.command()
def train(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS, wait: Wait = 0) -> None:
    """Train one run (one arm, one seed); a killed run goes on where it stopped.

    Prompts and embeddings are made first where the results folder lacks them.
    """
    from vipo.stages import train_stage

    train_stage(_checked(overrides, file), repository_root(), results, wait)


@app.command()
def plan(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GiB of a device; more is an error that says what would fit.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s that all processes together reach: seconds an update.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Count a run's memory, network evaluations and disk before it is started; reads no weights."""
    from vipo.prompts import read_prompts
    from vipo.training.plan import plan as planned
    from vipo.training.plan import require_fit
    from vipo.training.setup import prompts_path

    chosen, root = _checked(overrides, file), repository_root()
    prepared = prompts_path(results / chosen.experiment.name)
    # Before `prepare` nobody knows how many there are: those of one update then.
    prompts = len(read_prompts(prepared)) if prepared.is_file() else chosen.training.prompts_per_update
    found = planned(chosen, root, prompts)
    typer.echo(json.dumps(found.as_json(), indent=2) if as_json else found.text(tflops))
    if memory is not None:
        require_fit(chosen, root, prompts, found, memory * 2**30)


@app.command("check-generator")
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
        said=(lambda _: None) if as_json else _say,
    )
    if as_json:
        typer.echo(json.dumps([vars(found) for found in results], indent=2))
    if any(found.result == "fails" for found in results):
        raise typer.Exit(1)


@app.command()
def check(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
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


@app.command()
def evaluate(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
    wait: Wait = 0,
    weights: Annotated[
        Path | None,
        typer.Option(help="Other weights of the generator: a run's weights/, one of its updates/, a LoRA's folder."),
    ] = None,
) -> None:
    """Sample the held-out prompts with one run's weights and score them: `sample`, of the base too, then `score`."""
    from vipo.stages import evaluate_stage

    evaluate_stage(_checked(overrides, file), repository_root(), results, wait, weights)


@app.command()
def sample(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
    wait: Wait = 0,
    share: Part = None,
) -> None:
    """Draw the held-out prompts with one run's weights, or with the base: resumable, shared where asked for."""
    from vipo.stages import sample_stage

    sample_stage(_checked(overrides, file), repository_root(), results, wait, share)


@app.command()
def score(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
    wait: Wait = 0,
    share: Part = None,
) -> None:
    """Score one run's samples with all rewards, and against the base's samples: resumable, shared where asked for."""
    from vipo.stages import score_stage

    score_stage(_checked(overrides, file), repository_root(), results, wait, share)


@app.command()
def compare(overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS, wait: Wait = 0) -> None:
    """Compare all scored runs: by category, wins, all metrics together (Holm), totals of a set, diversity."""
    from vipo.stages import compare_stage

    for path in compare_stage(_configuration(overrides, file), repository_root(), results, wait):
        _say(path)


@app.command("draw")
def draw_command(
    run: Annotated[Path, typer.Argument(help="Folder results/<experiment>/runs/<arm>-s<seed>, trained.")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts, each in quotes.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .png file; default: <arm>-s<seed>.png here.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Pictures a prompt.")] = 4,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of the noise; default: evaluation's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Of the sampler; default: evaluation's.")] = None,
) -> None:
    """Draw prompts with the base and with a run's trained weights, from the same noise, into one picture."""
    target = Path(f"{run.resolve().name}.png") if output is None else output
    if target.suffix.lower() != ".png":
        raise ConfigError(f"--output {target}: must end in .png")
    from vipo.evaluation.side_by_side import draw_side_by_side

    _say(draw_side_by_side(run, prompts, target, repository_root(), samples=samples, seed=seed, steps=steps))


@app.command()
def summarize(
    overrides: Overrides = None, file: ConfigFile = None, results: Results = _RESULTS, wait: Wait = 0
) -> None:
    """Compare the experiment's runs in numbers, tables and figures: the report's data."""
    from vipo.stages import summarize_stage

    _say(summarize_stage(_configuration(overrides, file), repository_root(), results, wait))


@app.command()
def report(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
    wait: Wait = 0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw live.html of what there is so far, again after each change.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between looks.")] = 15,
) -> None:
    """Build the experiment's HTML report from all its runs (and its numbers first, where they are missing)."""
    from vipo.stages import report_stage, watch_stage

    config = _configuration(overrides, file)
    if watch:
        watch_stage(config, results, _say, every)
    else:
        _say(report_stage(config, repository_root(), results, wait))


@app.command()
def credit(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
    wait: Wait = 0,
    weights: Annotated[
        Path | None,
        typer.Option(help="A run's weights/, or one of its updates/; default: the generator as it is."),
    ] = None,
) -> None:
    """Measure, before any training, which arm's credit raises the reward most per unit of change (resumable).

    What is measured is section experiment.meter (experiment.meter.arms=[grpo,contrast], experiment.meter.updates=40).
    """
    from vipo.config.experiment import configured_arms
    from vipo.config.meter import MeterConfig

    chosen = _checked(overrides, file)
    meter = chosen.experiment.meter or MeterConfig()
    if file is None:
        rest = [text for text in overrides or [] if not text.startswith("arm=")]
        configs = {name: _checked([*rest, f"arm={name}"], None) for name in meter.arms}
    else:
        configs = configured_arms(file, chosen, meter.arms)
    from vipo.stages import credit_stage

    _say(credit_stage(configs, meter, repository_root(), results, weights, wait))


@app.command()
def study(
    experiments: Annotated[list[str], typer.Argument(help="Experiments; the first one's section `study` decides.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables, figures and the page.")],
    results: Results = _RESULTS,
) -> None:
    """Put a study together from its experiments' results: tables, figures, the decision on the default."""
    from vipo.stages import study_stage

    configs = [load_config([f"experiment={name}", "arm=base"]) for name in experiments]
    _say(study_stage(configs, results, output))


@app.command()
def published(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
) -> None:
    """Show an experiment's means beside the published table that it is to fill again, in Markdown."""
    from vipo.reporting.published import published_table

    typer.echo(published_table(_configuration(overrides, file), results), nl=False)


@app.command()
def crate(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = _RESULTS,
    wait: Wait = 0,
    key: Annotated[
        Path | None, typer.Option("--sign", help="Sign it with this SSH key (ssh-keygen -Y sign, namespace vipo).")
    ] = None,
    archive: Annotated[bool, typer.Option("--zip", help="Also put it into results/<experiment>.crate.zip.")] = False,
) -> None:
    """Describe the experiment as a Workflow Run RO-Crate: files, runs, parameters, software."""
    from vipo.stages import crate_stage

    for path in crate_stage(_configuration(overrides, file), repository_root(), results, wait, key, archive):
        _say(path)


@app.command("serve-reward")
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


@app.command("score-beside")
def score_beside(
    name: Annotated[str, typer.Argument(help="A reward of ours, such as hpsv2.")],
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.")],
    prompts: Annotated[list[str], typer.Option("--prompt", help="One for all pictures, or one each.")],
    environment: Annotated[
        str | None, typer.Option(help="Virtual environment of its own package; default: envs/NAME.")
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
    process = {"environment": environment or f"envs/{name}", "arguments": theirs}
    if original is not None:
        process["reward"] = original
    _say(beside(name, own, process, pictures, prompts, device).text())


app.command("map")(map_command)
app.command()(orientation)


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
    from vipo.stages import base_stage

    base_stage(chosen.pretrain, repository_root(), output)


@app.command()
def diff(
    run_a: Annotated[Path, typer.Argument(help="Folder results/<experiment>/runs/<arm>-s<seed>.")],
    run_b: Annotated[Path, typer.Argument(help="Another such folder, of the same experiment or another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON with full hashes instead of tables.")] = False,
) -> None:
    """Show what differs between two runs (configuration, code, environment, data) and what came of it."""
    from vipo.handover.diff import diff_runs
    from vipo.handover.diff_text import render_diff

    found = diff_runs(run_a, run_b)
    shown = json.dumps(found.as_json(), indent=1, allow_nan=False) if as_json else visible(render_diff(found))
    typer.echo(shown, nl=as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder results/<experiment>/runs/<arm>-s<seed>, trained and evaluated.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder; default: results/<experiment>/export/<run>.")
    ] = None,
    license_id: Annotated[
        str | None,
        typer.Option("--license", help="Licence identifier of the Hub; default: what the base generator's card says."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Hub id of the base generator, where the run read it from a folder."),
    ] = None,
    layout: Annotated[
        Literal["diffusers", "comfyui"],
        typer.Option("--format", help="comfyui: one file under the names of the family's original repository."),
    ] = "diffusers",
) -> None:
    """Write a folder that is ready for the Hub: weights, model card, samples, configuration, provenance."""
    from vipo.handover.export import export_run

    _say(
        export_run(
            run,
            output,
            repository_root(),
            license_id=license_id,
            base_model=base_model,
            comfyui=layout == "comfyui",
        )
    )


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A finished folder, such as results/demo.")],
    url: Annotated[str, typer.Argument(help="s3://bucket/folder, gs://bucket/folder, file:///folder.")],
    read_back: Annotated[
        bool, typer.Option("--read-back", help="Read what the store has already, too, instead of comparing sizes.")
    ] = False,
) -> None:
    """Copy results to an object store and check there what arrived; its SHA256SUMS is written last."""
    from vipo.provenance.upload import upload_folder

    sent, kept = upload_folder(folder, url, repository_root(), read_back=read_back)
    how = "read back" if read_back else "by SHA256SUMS and size, not read back"
    _say(f"{url}: {len(sent)} files sent and read back; {len(kept)} were there ({how})")


@app.command()
def audit(
    path: Annotated[Path, typer.Argument(help="An experiment's results, such as results/demo, or an unpacked crate.")],
    allowed_signers: Annotated[
        Path | None,
        typer.Option(help="Keys you trust (man ssh-keygen, ALLOWED SIGNERS): check the crate's signature."),
    ] = None,
    rerun: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Run this stage again (runs/vipo-s0, report, …) and compare bytes."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check results: bytes, lineage, code, configurations, numbers; exit status 1 where they do not hold together."""
    from vipo.audit import audit_experiment

    result = audit_experiment(path, repository_root(), allowed_signers=allowed_signers, rerun=rerun)
    typer.echo(json.dumps(result.model_dump(mode="json"), indent=2) if as_json else visible(result.text()))
    if result.verdict == "broken":
        raise typer.Exit(1)


def _expanded(argument: str) -> str:
    # A shell leaves `--results=~/x` as it is. What has no slash is one of Hydra's deletions, but for `~` alone.
    found = _HOME.fullmatch(argument)
    return f"{found[1] or ''}{os.path.expanduser(found[2])}" if found else argument  # noqa: PTH111


def main() -> None:
    """Entry point: errors that a user can mend are printed without a traceback, with exit status 1 (75: preempted)."""
    end_plainly(lambda: app([_expanded(argument) for argument in sys.argv[1:]]))


if __name__ == "__main__":
    main()
