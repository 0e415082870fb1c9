"""Snakemake deletes a job's outputs before it starts the job: finished results make way first, or nothing starts."""

from vipo.errors import VipoError
from vipo.provenance.superseded import PlannedJob, make_way

# Snakemake reads true as a text and True as a truth.
SET_ASIDE = {"true": True, "false": False}.get(
    str(config.get("set_aside", False)).lower()
)
if SET_ASIDE is None:
    raise WorkflowError(
        f"--config set_aside={config['set_aside']}: is neither true nor false"
    )


def planned_jobs():
    """All jobs that are about to start, with the cause in a few words."""
    for job in workflow.dag.needrun_jobs():
        reason = workflow.dag.reason(job)
        cut_off = workflow.async_run(workflow.persistence.incomplete(job))
        files = sorted(reason.updated_input - reason.updated_input_run)
        newer = ", ".join(map(str, files[:2]))
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
            run=job.wildcards_dict.get("run"),
            cause=", ".join(told for holds, told in causes if holds),
            incomplete=bool(cut_off),
        )


def keep_finished_results():
    """Set finished results aside, or stop, as it was agreed; `--touch` deletes nothing."""
    if workflow.touch:
        return
    how = "the same command with set_aside=true after --config"
    folder = Path(EXPERIMENT_DIR)
    try:
        aside = make_way(folder, list(planned_jobs()), consent=SET_ASIDE, how=how)
    except VipoError as error:
        restore_configurations()
        raise WorkflowError(str(error)) from None
    if aside is not None:
        logger.info(f"{folder}: what is made again was set aside as {aside}.")
