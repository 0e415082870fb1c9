"""Commands that read finished results: reports, studies, exports, the audit."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from vipo.commands.options import RESULTS, ConfigFile, Overrides, Results, Wait, say
from vipo.config.compose import configuration, load_config, repository_root
from vipo.text import visible


def summarize(overrides: Overrides = None, file: ConfigFile = None, results: Results = RESULTS, wait: Wait = 0) -> None:
    """Compare the experiment's runs in numbers, tables and figures: the report's data."""
    from vipo.stages import summarize_stage

    say(summarize_stage(configuration(overrides, file), repository_root(), results, wait))


def report(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = RESULTS,
    wait: Wait = 0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw live.html of what there is so far, again after each change.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, max=86400, help="With --watch: seconds between looks.")] = 15,
) -> None:
    """Build the experiment's HTML report from all its runs (and its numbers first, where they are missing)."""
    from vipo.stages import report_stage, watch_stage

    config = configuration(overrides, file)
    if watch:
        # That is how one stops looking; nothing is left undone.
        with contextlib.suppress(KeyboardInterrupt):
            watch_stage(config, results, say, every)
    else:
        say(report_stage(config, repository_root(), results, wait))


def study(
    experiments: Annotated[list[str], typer.Argument(help="Experiments; the first one's section `study` decides.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables, figures and the page.")],
    results: Results = RESULTS,
) -> None:
    """Put a study together from its experiments' results: tables, figures, the decision on the default."""
    from vipo.stages import study_stage

    configs = [load_config([f"experiment={name}", "arm=base"]) for name in experiments]
    say(study_stage(configs, results, output))


def registered(
    experiment: Annotated[str, typer.Argument(help="An experiment whose section `registered` fixes what is measured.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tables, the page and the picture.")],
    results: Results = RESULTS,
) -> None:
    """Compute a registered experiment's measures and its rule's verdict, when all of its runs are evaluated."""
    from vipo.reporting.registered import write_registered

    for path in write_registered(load_config([f"experiment={experiment}", "arm=base"]), results, output):
        say(path)


def published(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = RESULTS,
) -> None:
    """Show an experiment's means beside the published table that it is to fill again, in Markdown."""
    from vipo.reporting.published import published_table

    typer.echo(published_table(configuration(overrides, file), results), nl=False)


def crate(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = RESULTS,
    wait: Wait = 0,
    key: Annotated[
        Path | None, typer.Option("--sign", help="Sign it with this SSH key (ssh-keygen -Y sign, namespace vipo).")
    ] = None,
    archive: Annotated[bool, typer.Option("--zip", help="Also put it into results/<experiment>.crate.zip.")] = False,
) -> None:
    """Describe the experiment as a Workflow Run RO-Crate: files, runs, parameters, software."""
    from vipo.stages import crate_stage

    for path in crate_stage(configuration(overrides, file), repository_root(), results, wait, key, archive):
        say(path)


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
        typer.Option("--format", help="comfyui: one file under the names that ComfyUI has for the family's layers."),
    ] = "diffusers",
) -> None:
    """Write a folder that is ready for the Hub: weights, model card, samples, configuration, provenance."""
    from vipo.handover.export import export_run

    say(
        export_run(
            run,
            output,
            repository_root(),
            license_id=license_id,
            base_model=base_model,
            comfyui=layout == "comfyui",
        )
    )


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
    say(f"{url}: {len(sent)} files sent and read back; {len(kept)} were there ({how})")


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
