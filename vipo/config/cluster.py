"""What a stage's job asks of a cluster, in the names that Snakemake's Slurm executor reads."""

from typing import Literal

from vipo.config.run import Config

Stage = Literal["prepare", "encode", "train", "evaluate", "report", "crate"]


def job_resources(config: Config, stage: Stage, *, alone: bool = False) -> dict[str, str | int]:
    """The ``resources:`` of a stage's rule.

    Beside what Slurm is asked for: ``cuda`` is 1 for a stage that computes on CUDA devices, so that a machine without
    a scheduler runs one such job at a time (``--resources cuda=1``); ``launch`` starts the stage's command, once on
    each node. Several nodes are ``mpi`` to the executor: it leaves the job steps to ``launch``.

    Args:
        config: the configuration of a run, or of any run for a stage that all runs share.
        stage: what section `cluster` calls a rule of the workflow; sample and score are evaluate, credit is train.
        alone: it is one process, whatever the runs have.
    """
    asked = getattr(config.cluster, stage)
    train, distribution = stage == "train", config.distribution
    # What was asked for was meant for the processes of a run.
    alone = alone and distribution.world_size > 1
    processes = distribution.processes if stage in ("train", "evaluate") and not alone else 1
    nodes = distribution.nodes if train and not alone else 1
    cuda = int(config.generator.device != "cpu" and stage in ("encode", "train", "evaluate"))
    gpus = processes * cuda if asked.gpus is None or alone else asked.gpus
    cpus = processes * config.training.threads if asked.cpus is None or alone else asked.cpus
    named = {"slurm_partition": asked.partition, "slurm_account": config.cluster.account, "qos": asked.qos}
    resources: dict[str, str | int] = {name: value for name, value in named.items() if value is not None}
    resources |= {
        "mem_mb": asked.memory_mb,
        "runtime": asked.runtime_minutes,
        "nodes": nodes,
        "cpus_per_task": cpus,
        "cuda": cuda,
        "launch": "",
    }
    if gpus:
        # Per node; the executor's own `gpu` is a number for the whole job, spread over its nodes as Slurm likes.
        resources["gres"] = f"gpu:{gpus}"
    if train and config.cluster.stop_seconds:
        # To the job's steps alone: what waits for them goes on waiting.
        resources["slurm_extra"] = f"--signal=TERM@{config.cluster.stop_seconds}"
    if nodes > 1:
        gres = f" --gres=gpu:{gpus}" if gpus else ""
        # A node that has nothing to write ends before the one that writes the last checkpoint, and must not end it.
        launch = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0"
        resources |= {
            "mpi": "srun",
            "tasks": nodes,
            # Not a task for each GPU: a node's one task starts the processes of its GPUs.
            "tasks_per_gpu": 0,
            "launch": f"{launch} --cpus-per-task={cpus}{gres} ",
        }
    return resources
