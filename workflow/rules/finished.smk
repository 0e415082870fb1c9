"""Snakemake deletes a job's outputs before it starts the job: finished results make way first, or nothing starts."""

import shlex
import sys

from vipo.errors import VipoError
from vipo.provenance.superseded import PlannedJob, make_way
from vipo.text import one_line

# Snakemake reads true as a text and True as a truth.
SET_ASIDE = {"true": True, "false": False}.get(
    str(config.get("set_aside", False)).lower()
)
if SET_ASIDE is None:
    raise WorkflowError(
        f"--config set_aside={config['set_aside']}: is neither true nor false"
    )


def consenting_command():
    """What to type to agree: what was typed, with the word of consent where it belongs."""
    if again := os.environ.get("VIPO_AGAIN"):
        return f"{again} SET_ASIDE=true"
    given = sys.argv[1:]
    place = next(
        (n for n, word in enumerate(given, 1) if word in ("--config", "-C")), None
    )
    if place is None:
        given += ["--config", "set_aside=true"]
    else:
        given.insert(place, "set_aside=true")
    return shlex.join(["snakemake", *given])


def planned_jobs():
    """All jobs that are about to start, with the cause in a few words."""
    for job in workflow.dag.needrun_jobs():
        reason = workflow.dag.reason(job)
        cut_off = workflow.async_run(workflow.persistence.incomplete(job))
        files = sorted(reason.updated_input - reason.updated_input_run)
        newer = ", ".join(one_line(str(file), 200) for file in files[:2])
        causes = [
            (reason.forced, "forced"),
            (reason.params_changed, "its configuration changed"),
            (newer, f"changed since: {newer}"),
            (reason.input_changed, "it reads other files"),
            (reason.code_changed, "its rule changed"),
            (reason.software_stack_changed, "its environment changed"),
            (reason.missing_output, "a part is missing"),
        ]
        yield PlannedJob(
            stage=job.rule.name,
            run=job.wildcards_dict.get("run") or job.wildcards_dict.get("checkpoint"),
            cause=", ".join(told for holds, told in causes if holds),
            incomplete=bool(cut_off),
            identity=job.params.get("identity"),
        )


def keep_finished_results():
    """Set finished results aside, or stop, as it was agreed; `--touch` deletes nothing."""
    if workflow.touch:
        return
    folder = Path(EXPERIMENT_DIR)
    planned = list(planned_jobs())
    try:
        aside = make_way(folder, planned, consent=SET_ASIDE, how=consenting_command())
    except VipoError as error:
        remove_added_configurations()
        raise WorkflowError(str(error)) from None
    if aside is not None:
        logger.info(f"{folder}: what is made again was set aside as {aside}.")
