"""What Snakemake's Slurm executor leaves open: jobs of a snakemake that was killed, and jobs that were pre-empted."""

import re
import subprocess
import sys

from vipo.config.compose import load_config
from vipo.config.validation import ConfigError


def results_of(script):
    """The name below results/ that a Slurm job works in, by its batch script; None where that tells none."""
    if found := re.search(r"\bresults/(\w+)/configs/", script):
        return found[1]
    # A job that waits for more than twenty files has their names in a file of their own, which goes with its snakemake.
    if named := re.findall(r"\bexperiment\.name=(\w+)", script):
        return named[-1]
    chosen = re.search(r"(?<![\w.])experiment=([\w./-]+)", script)
    try:
        return load_config([chosen[0]]).experiment.name if chosen else None
    except ConfigError:
        return None


def jobs_left_behind():
    """Queued and running Slurm jobs that an earlier snakemake submitted for these results, ids with their comments.

    A job that tells no results, or that another user submitted and nobody else may read, counts as one.
    """
    queue = ["squeue", "--noheader", "--states=PD,CF,R,S,CG", "--format=%A|%Z|%k"]
    lines = subprocess.run(
        queue, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    found = {}
    for job, folder, comment in (line.split("|", 2) for line in lines):
        if Path(folder).resolve() != Path.cwd() or not comment.startswith("rule_"):
            continue
        read = ["scontrol", "write", "batch_script", job, "-"]
        script = subprocess.run(read, capture_output=True, text=True).stdout
        if results_of(script) in (None, Path(EXPERIMENT_DIR).name):
            found[job] = comment
    return found


def requeue_preempted_jobs():
    """Make the executor put jobs that pre-emption ended back into Slurm's queue, which uses up no retry.

    Slurm does so itself only where a partition requeues and the job outlives its grace time. A job that stops within it
    ends FAILED; one whose partition cancels ends PREEMPTED, which the executor waits on for ever. Both have a
    PreemptTime, until they are requeued. A cancelled job stays cancelled.
    """
    import snakemake_executor_plugin_slurm as executor

    query = executor.query_job_status
    failed = set()

    async def query_and_requeue(command, logger):
        states, seconds = await query(command, logger)
        known = states or {}
        # sacct says "CANCELLED by UID".
        known.update({job: state.partition(" ")[0] for job, state in known.items()})
        ended = {
            job for job, state in known.items() if state in ("FAILED", "PREEMPTED")
        } - failed
        if ended:
            # sacct may be late; this is what Slurm's controller says.
            ask = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(ended)}"]
            ask.append("--Format=JobID:20,State:20,PreemptTime:20")
            told = subprocess.run(ask, capture_output=True, text=True)
            if told.returncode == 0 or "Invalid job id" in told.stderr:
                # What it has forgotten can come back no more.
                known.update(dict.fromkeys(ended, "FAILED"))
            for job, state, preempted in map(str.split, told.stdout.splitlines()):
                requeue = ["scontrol", "requeue", job]
                if state not in ("FAILED", "PREEMPTED"):
                    known[job] = state
                elif preempted != "N/A" and subprocess.run(requeue).returncode == 0:
                    known[job] = "PENDING"
                    logger.info(f"Slurm job {job} was pre-empted and is queued again.")
                else:
                    known[job] = "FAILED"
            # Snakemake submits these again: they must not come back beside that.
            failed.update(job for job in ended if known[job] == "FAILED")
        for job in failed & known.keys():
            known[job] = "FAILED"
        return states, seconds

    executor.query_job_status = query_and_requeue


def check_cluster():
    """Where jobs go to Slurm: refuse what does not get there, and an earlier snakemake's jobs."""
    if workflow.executor_plugin.name == "slurm":
        if re.search(r"\s", sys.executable):
            raise WorkflowError(
                f"{sys.executable}: a Slurm job cannot start this Python, for its path holds a space and Snakemake does "
                "not quote it; move the checkout, or its environment, to a path without one"
            )
        # Snakemake hands them to its jobs through two shells.
        if quoted := [text for text in OVERRIDES if re.search(r"[\"'\\$`]", text)]:
            raise WorkflowError(
                f"overrides {quoted} do not survive the way into a Slurm job: write them without quotes, backslashes, "
                "$ and `, or into a file of configs/experiment"
            )
        if left := jobs_left_behind():
            listed = ", ".join(f"{job} ({comment})" for job, comment in left.items())
            raise WorkflowError(
                f"Slurm jobs of an earlier snakemake still work on experiment {EXPERIMENT}: {listed}. Wait until they "
                f"have ended, or stop them with 'scancel {' '.join(left)}' (training keeps its checkpoint), then start "
                "again"
            )
        requeue_preempted_jobs()
