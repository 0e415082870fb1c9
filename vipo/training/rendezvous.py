"""Where the ranks of a run meet: its nodes, their order and a port."""

import socket
import subprocess
from collections.abc import Mapping

from vipo.config.training import DistributionConfig
from vipo.training.errors import TrainingError


def rendezvous(config: DistributionConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Where the processes of all nodes meet, and which node this is: MASTER_ADDR, MASTER_PORT and NODE_RANK.

    One node needs nothing. Several take it from Slurm's variables, or from these three themselves.

    Raises:
        TrainingError: it is several nodes, and the environment does not tell.
    """
    if config.nodes == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    found = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name in environment}
    if "SLURM_NODEID" in environment:
        try:
            found = _of_slurm(config, environment) | found
        except (LookupError, ValueError) as error:
            raise TrainingError(
                f"the environment of this Slurm step is not whole ({error!r}); start it with srun"
            ) from error
        except (OSError, subprocess.CalledProcessError) as error:
            raise TrainingError(f"the nodes of this Slurm step cannot be told ({error}); is scontrol there?") from error
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in found]:
        raise TrainingError(
            f"distribution.nodes is {config.nodes}, and {', '.join(missing)} are not set: start one 'vipo train' on "
            "each node with these variables, or under Slurm's srun"
        )
    for name, end in (("MASTER_PORT", 65536), ("NODE_RANK", config.nodes)):
        if not (found[name].isascii() and found[name].isdecimal() and int(found[name][:10]) < end):
            raise TrainingError(f"{name} {found[name][:40]!r} is no whole number below {end}; set the right one")
    return found


def _of_slurm(config: DistributionConfig, environment: Mapping[str, str]) -> dict[str, str]:
    if int(environment.get("SLURM_STEP_NUM_NODES", environment["SLURM_NNODES"])) != config.nodes:
        raise TrainingError(
            f"distribution.nodes is {config.nodes}, but this Slurm step has "
            f"{environment.get('SLURM_STEP_NUM_NODES', environment['SLURM_NNODES'])} nodes; start it with "
            f"srun --nodes={config.nodes} --ntasks-per-node=1"
        )
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", config.nodes))
    if tasks != config.nodes or environment.get("SLURM_LOCALID", "0") != "0":
        raise TrainingError(
            f"this Slurm step has several tasks on a node ({tasks} in all), and each would start all of the node's "
            f"processes; start it with srun --nodes={config.nodes} --ntasks-per-node=1"
        )
    # A step may have fewer nodes than its job.
    nodes = environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"])
    names = ["scontrol", "show", "hostnames", nodes]
    hosts = subprocess.run(names, check=True, capture_output=True, text=True).stdout.split()
    # The same on every node, and another one for the next job.
    port = str(20000 + int(environment["SLURM_JOB_ID"]) % 20000)
    return {"MASTER_ADDR": hosts[0], "MASTER_PORT": port, "NODE_RANK": environment["SLURM_NODEID"]}
