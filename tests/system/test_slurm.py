"""The workflow on a real Slurm: a private cluster of two nodes with fake GPUs, started and stopped here.

Needs root and Debian's slurm-wlm and munge; their absence fails.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from bad_rewards import standing
from waits import SECONDS, ended, eventually

from vipo.config.compose import load_config, repository_root
from vipo.provenance import read_provenance
from vipo.stages import evaluate_stage, train_stage
from vipo.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.slurm

ROOT = repository_root()
UPDATES = 8

SLURM_CONF = """\
ClusterName=vipo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdLogFile={folder}/%n.log
# The machine has neither the cores nor the memory that a node claims.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
# Long enough for the test to look back at every job.
MinJobAge=3600
# A job that can start does: the defaults gather jobs for seconds and look at waiting ones every half minute.
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=1 RealMemory=8000 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=1 RealMemory=8000 Gres=gpu:2
PartitionName=cpu Nodes=node[1-2] Default=YES
PartitionName=gpu Nodes=node[1-2]
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=requeued Nodes=node1 GraceTime=20
PartitionName=cancelled Nodes=node2 PreemptMode=CANCEL
PartitionName=urgent Nodes=node[1-2] PriorityTier=2
"""

# Snakemake that asks Slurm every second: the executor asks less and less often, and stages here are short.
SNAKEMAKE = """\
import snakemake_executor_plugin_slurm as slurm
from snakemake.cli import main
slurm.Executor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, seconds: None)
main()
"""

# In vipo's place: a stage that SIGTERM stops, as training, and that does its work when it is started again.
STAND_IN = """\
#!/bin/sh
mkdir started || exec {vipo} "$@"
trap 'exit 75' TERM
while :; do sleep 0.1; done
"""


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass(frozen=True)
class Job:
    """A Slurm job as squeue tells it; the last two are ISO times."""

    id: str
    comment: str
    state: str
    start: str
    end: str


@dataclass(frozen=True)
class Cluster:
    """The environment in which Slurm's commands reach the private cluster."""

    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        """The output of a command that must succeed."""
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def jobs(self, comment: str = "", states: str = "all") -> list[Job]:
        """Jobs in the order of their ids, those that ended included."""
        lines = self.ask("squeue", "-h", f"--states={states}", "--format=%A|%k|%T|%S|%e").splitlines()
        jobs = [Job(*line.split("|")) for line in lines]
        return sorted((job for job in jobs if job.comment.startswith(comment)), key=lambda job: int(job.id))

    def queue(self, comment: str = "") -> list[Job]:
        """Jobs that have not ended."""
        return self.jobs(comment, "PD,CF,R,S,CG")


@contextmanager
def _daemon(*command: str | Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert os.geteuid() == 0, "a cluster needs root: run `make test-slurm` as root"
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        assert shutil.which(name), f"no {name}: apt-get install slurm-wlm munge"
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "node1", "node2", "devices", "bin"):
        (folder / name).mkdir()
    (folder / "munge.key").touch(mode=0o400)
    (folder / "munge.key").write_bytes(os.urandom(128))
    controller, node1, node2 = _free_ports(3)
    conf = folder / "slurm.conf"
    values = {"host": socket.gethostname().split(".")[0], "controller": controller, "node1": node1, "node2": node2}
    conf.write_text(SLURM_CONF.format(folder=folder, **values))
    for number in (0, 1):
        # As /dev/null: nobody computes on it.
        os.mknod(folder / "devices" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/devices/nvidia[0-1]\n")
    # The executor's job steps start without SLURM_CONF; a site's cluster has its file where srun looks first.
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": path, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT / 'tests' / 'e2e'}:{os.environ.get('PYTHONPATH', '')}"
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
    munged += [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    daemons = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"]]
    with ExitStack() as stack:
        running: list[subprocess.Popen[bytes]] = []

        def alive() -> bool:
            for daemon in running:
                assert daemon.poll() is None, f"{daemon.args} ended with status {daemon.returncode}; logs: {folder}"
            return True

        for daemon in daemons:
            running.append(stack.enter_context(_daemon(*daemon, environment=environment)))
            if daemon is munged:
                eventually("munge answers", lambda: alive() and (folder / "munge.socket").exists())
        made = Cluster(environment)
        ready = ["sinfo", "-h", "-N", "-p", "cpu", "-o", "%T"]
        eventually(
            "both nodes are idle",
            lambda: alive() and subprocess.run(ready, env=environment, capture_output=True).stdout == b"idle\nidle\n",
        )
        yield made
        if left := [job.id for job in made.queue()]:
            made.ask("scancel", *left)
            eventually("every job has ended", lambda: not made.queue())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a checkout holds beside the package."""
    folder = tmp_path / "project"
    for name in ("configs", "workflow", "data/prompts"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Snakefile", "requirements.lock", "CITATION.cff", "slurm"):
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    """Base and one trained run, on one fake GPU, which the test can hold."""
    return [
        *(text for text in tiny_overrides if not text.startswith(("experiment=", "training.micro_batch="))),
        "~experiment.arms.vipo",
        "~experiment.arms.product",
        "~experiment.arms.inverted",
        "experiment.arms.grpo.seeds=[0]",
        "reward.terms=[{name: bad_rewards:Stands}]",
        "evaluation.rewards=[bad_rewards:Stands]",
        f"training.updates={UPDATES}",
        "training.micro_batch=2",
        "cluster.train.partition=gpu",
        "cluster.train.gpus=1",
        "cluster.train.memory_mb=3000",
        "cluster.train.runtime_minutes=20",
    ]


@dataclass(frozen=True)
class Workflow:
    """``snakemake --profile slurm`` in a project folder; where it was told to (`arm`), the next training stands still
    after its first updates until a signal reaches it."""

    cluster: Cluster
    project: Path
    overrides: list[str]

    @property
    def armed(self) -> Path:
        return self.project / "armed"

    def arm(self) -> None:
        standing(self.armed).unlink(missing_ok=True)
        self.armed.touch()

    @property
    def run(self) -> Path:
        return self.project / "results/demo/runs/grpo-s0"

    @property
    def updates(self) -> int:
        """Updates that the run's metrics know."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    @property
    def log(self) -> str:
        """Of the newest training job."""
        return (self.project / "results/demo/logs/train-grpo-s0.log").read_text()

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A snakemake that is killed when the block ends."""
        command = [sys.executable, "-c", SNAKEMAKE, "--profile", "slurm", "--latency-wait", "5", *arguments]
        command += ["--config", "experiment=demo", f"overrides={json.dumps(self.overrides)}"]
        # After the trial and the first update's calls, four on one node and two on each of two.
        environment = self.cluster.environment | {"STAND": str(self.armed), "STAND_AT": "6"}
        with (self.project / "shown").open("wb") as shown:
            process = subprocess.Popen(command, cwd=self.project, env=environment, stdout=shown, stderr=shown)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def finished(self, *arguments: str) -> int:
        """The exit status of a snakemake that ends by itself."""
        with self.started(*arguments) as process:
            return self.ended(process)

    def ended(self, snakemake: subprocess.Popen[bytes]) -> int:
        """The exit status of the newest snakemake, once it has ended."""
        try:
            return snakemake.wait(SECONDS)
        except subprocess.TimeoutExpired:
            queue = [(job.comment, job.state) for job in self.cluster.queue()]
            raise AssertionError(f"snakemake has not ended within {SECONDS} s; queue: {queue}; {self.shown}") from None

    @property
    def shown(self) -> str:
        """What the newest snakemake printed."""
        return (self.project / "shown").read_text()

    def standing_job(self, snakemake: subprocess.Popen[bytes], after: int) -> Job:
        """The job that trains, standing still after more than `after` updates."""
        eventually("training stands still", standing(self.armed).exists, ended(snakemake, self.project / "shown"))
        assert self.updates > after
        (job,) = self.cluster.queue("rule_train")
        return job


def _artifacts(run: Path) -> dict[str, bytes]:
    found = [run / "metrics.jsonl", *run.glob("weights/**/[!.]*.*"), *run.glob("updates/**/[!.]*.*")]
    assert len(found) >= 3
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def _bytes(folder: Path) -> dict[str, bytes]:
    """Pictures, scores and maps, without records."""
    found = [path for path in folder.rglob("*") if path.suffix in (".png", ".parquet", ".safetensors")]
    assert found
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_demo_goes_through_a_killed_snakemake_and_stopped_jobs(
    cluster: Cluster, project: Path, prepared: Path, overrides: list[str], measured_parts: list[str]
) -> None:
    overrides = [*overrides, *measured_parts]
    workflow = Workflow(cluster, project, overrides)
    # Snakemake is killed while a job trains: the job goes on.
    workflow.arm()
    with workflow.started() as first:
        job = workflow.standing_job(first, 0)
    asked = cluster.ask("scontrol", "show", "job", job.id)
    for told in ("Partition=gpu", "TresPerNode=gres:gpu:1", "TimeLimit=00:20:00", "MinMemoryNode=3000M", "NumNodes=1"):
        assert told in asked, asked

    # Another snakemake does not submit it a second time.
    before = [known.id for known in cluster.jobs()]
    assert workflow.finished("--unlock") == 0
    assert workflow.finished() == 1
    assert re.search(rf"experiment demo: .*{job.id} \(rule_train_wildcards_grpo-s0\).*'scancel ", workflow.shown)
    assert [known.id for known in cluster.jobs()] == before

    # Stopped with all its processes, it keeps its last update.
    stopped = {known.id for known in cluster.queue()}
    cluster.ask("scancel", *stopped)
    eventually("the cancelled job has ended", lambda: not cluster.queue())
    assert "stopped by SIGTERM after update" in workflow.log
    done = int(list_checkpoints(workflow.run / "checkpoints")[0].name)
    assert 1 <= done < UPDATES - 2
    assert not (workflow.run / "provenance.json").exists()

    # A third snakemake goes on from there; the signal before the time limit reaches the step alone, and it tries again.
    workflow.arm()
    with workflow.started() as third:
        job = workflow.standing_job(third, done)
        cluster.ask("scancel", "--signal=TERM", job.id)
        assert workflow.ended(third) == 0, workflow.shown
    assert (project / "results/demo/report/index.html").is_file()
    assert (project / "results/demo/ro-crate-metadata.json").is_file()

    # Every stage ran as a job, and one after the other where it was the same one.
    trained = cluster.jobs("rule_train")
    assert [known.state for known in trained] == ["CANCELLED", "FAILED", "COMPLETED"]
    assert all(earlier.end <= later.start for earlier, later in pairwise(trained))
    for stage in (
        "prepare",
        "encode",
        "sample_wildcards_grpo-s0",
        "score_wildcards_grpo-s0",
        "credit",
        "report",
        "crate",
    ):
        assert [known.state for known in cluster.jobs(f"rule_{stage}")] == ["COMPLETED"], stage
    # Each share of the samples and of their scores is a job; what they make together is not put together otherwise.
    for stage in ("sample", "score"):
        for run in ("base-s0", "grpo-s0"):
            # On a slow machine one of the base's is stopped with the training, and begun again.
            shares = [s for s in cluster.jobs(f"rule_{stage}_share_wildcards_{run}") if s.id not in stopped]
            assert [known.state for known in shares] == ["COMPLETED", "COMPLETED"], (stage, run)
            (made,) = cluster.jobs(f"rule_{stage}_wildcards_{run}")
            assert max(share.end for share in shares) <= made.start

    # An undisturbed run ends with the same bytes.
    undisturbed = shutil.copytree(prepared, project.with_name("undisturbed"))
    config = load_config(["experiment=demo", "arm=grpo", *overrides])
    train_stage(config, ROOT, undisturbed)
    assert _artifacts(workflow.run) == _artifacts(undisturbed / "demo/runs/grpo-s0")
    evaluate_stage(config, ROOT, undisturbed)
    for place in ("samples/base-s0", "samples/grpo-s0", "evaluation/grpo-s0"):
        assert _bytes(project / "results/demo" / place) == _bytes(undisturbed / "demo" / place), place


def test_two_nodes_train_one_run_and_stop_together(
    cluster: Cluster, project: Path, prepared: Path, overrides: list[str]
) -> None:
    # Both nodes are this machine, which does not know their names.
    named = Cluster(cluster.environment | {"MASTER_ADDR": "127.0.0.1"})
    workflow = Workflow(named, project, [*overrides, "distribution.nodes=2"])
    shutil.copytree(prepared, project / "results")
    earlier = len(cluster.jobs("rule_train"))
    workflow.arm()
    with workflow.started("results/demo/runs/grpo-s0/metrics.jsonl") as snakemake:
        job = workflow.standing_job(snakemake, 0)
        asked = cluster.ask("scontrol", "show", "job", job.id)
        assert "NumNodes=2" in asked
        assert "NodeList=node[1-2]" in asked
        cluster.ask("scancel", "--signal=TERM", job.id)
        assert workflow.ended(snakemake) == 0, workflow.shown
    assert [known.state for known in cluster.jobs("rule_train")[earlier:]] == ["FAILED", "COMPLETED"]
    assert "resumed after update" in workflow.log
    # Two processes of one node sum in the same order.
    undisturbed = shutil.copytree(prepared, project.with_name("undisturbed"))
    command = ["vipo", "train", "experiment=demo", "arm=grpo", *overrides, "distribution.processes=2"]
    subprocess.run([*command, "--results", undisturbed], cwd=ROOT, env=cluster.environment, check=True)
    assert _artifacts(workflow.run) == _artifacts(undisturbed / "demo/runs/grpo-s0")


def test_preempted_jobs_go_on_and_use_up_no_retry(cluster: Cluster, project: Path, tiny_overrides: list[str]) -> None:
    """In two partitions: one requeues after a grace time within which the stage stops, one cancels at once."""
    stand_in = project / "bin" / "vipo"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN.format(vipo=shutil.which("vipo", path=cluster.environment["PATH"])))
    stand_in.chmod(0o755)
    # In a container, which has no Slurm.
    image = project / "containers" / "vipo.sif"
    image.parent.mkdir()
    image.write_bytes(b"an image")
    path = f"{stand_in.parent}:{ROOT / 'tests' / 'stand_ins'}:{cluster.environment['PATH']}"
    log = project / "apptainer.jsonl"
    standing = Cluster(cluster.environment | {"PATH": path, "APPTAINER_STAND_IN_LOG": str(log)})
    projects = [project, shutil.copytree(project, project.with_name("another"), symlinks=True)]
    overrides = [text for text in tiny_overrides if not text.startswith("experiment=")]
    earlier = len(cluster.jobs("rule_prepare"))
    with ExitStack() as stack:
        runs = []
        for partition, folder in zip(("requeued", "cancelled"), projects, strict=True):
            workflow = Workflow(standing, folder, [*overrides, f"cluster.prepare.partition={partition}"])
            started = workflow.started("results/demo/prompts/manifest.json", "--retries", "0", "--sdm", "apptainer")
            runs.append((workflow, stack.enter_context(started)))

        def ended() -> str:
            return "".join(workflow.shown for workflow, snakemake in runs if snakemake.poll() is not None)

        eventually("both jobs run", lambda: ended() or all((folder / "started").is_dir() for folder in projects))
        assert not ended()
        cluster.ask("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")

        def states() -> list[str]:
            return [job.state for job in cluster.jobs("rule_prepare")[earlier:]]

        eventually("both jobs are queued again", lambda: ended() or states() == ["PENDING", "PENDING"])
        assert not ended()
        # Slurm holds back for two minutes what was requeued.
        for job in cluster.queue("rule_prepare"):
            cluster.ask("scontrol", "update", f"JobId={job.id}", "StartTime=now")
        for workflow, snakemake in runs:
            assert workflow.ended(snakemake) == 0, workflow.shown
            assert "was pre-empted and is queued again" in workflow.shown
        assert states() == ["COMPLETED", "COMPLETED"]
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(call[2] for call in calls) == sorted(str(folder) for folder in projects for _ in range(2))
    for call in calls:
        assert "--nv" in call
        assert call[-4:-1] == ["containers/vipo.sif", "bash", "-c"]
        assert "vipo prepare --config results/demo/configs/" in call[-1]
    digest = "sha256:" + hashlib.sha256(b"an image").hexdigest()
    for folder in projects:
        assert read_provenance(folder / "results/demo/prompts/provenance.json")["container_digest"] == digest
