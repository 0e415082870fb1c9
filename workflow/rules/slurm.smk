"""A snakemake that was killed leaves its Slurm jobs behind: a new one does not submit them a second time."""

import re
import subprocess


def jobs_left_behind():
    """Queued and running Slurm jobs that an earlier snakemake submitted for this experiment, ids with their comments.

    A job's batch script tells the experiment on its command line. One that tells none, or that another user submitted
    and nobody else may read, counts as this experiment's.
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
        told = re.findall(r"\bexperiment=(\w+)", script)
        if not told or EXPERIMENT in told:
            found[job] = comment
    return found


onstart:
    if workflow.executor_plugin.name == "slurm":
        # Snakemake hands them to its jobs through two shells.
        if quoted := [text for text in OVERRIDES if re.search(r"[\"'\\$`]", text)]:
            raise WorkflowError(
                f"overrides {quoted} do not survive the way into a Slurm job: write them without quotes, backslashes, "
                "$ and `, or into a file of configs/experiment"
            )
        if left := jobs_left_behind():
            listed = ", ".join(
                f"{job} ({comment})" for job, comment in left.items()
            )
            raise WorkflowError(
                f"Slurm jobs of an earlier snakemake still work on experiment {EXPERIMENT}: {listed}. Wait until they "
                f"have ended, or stop them with 'scancel {' '.join(left)}' (training keeps its checkpoint), then start "
                "again"
            )
