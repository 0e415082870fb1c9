"""The `train` stage: a run into its folder, with its lock and its record."""

from pathlib import Path

from vipo.config.run import Config
from vipo.memory import memory_errors
from vipo.provenance import code_identity, record_stage, run_lock
from vipo.rewards import identities
from vipo.training.run import packages, train
from vipo.training.setup import Setup, embeddings_path, prompts_path, set_up
from vipo.training.state import run_identity, set_aside_other

_STATE_REMEDY = (
    "That is weights, gradients, the optimizer's state, and the reference where there is one: set training.lora={}, or "
    "distribution.strategy=fsdp with more processes (the first of a node reads the whole network into main memory), "
    "choose a smaller generator, or raise cluster.train.memory_mb where main memory ran out"
)


def train_run(config: Config, root: Path, experiment: Path, wait: float = 0) -> None:
    """The `train` stage: one arm and seed into ``runs/<arm>-s<seed>``, with its provenance.

    Args:
        config: the run.
        root: repository root.
        experiment: ``results/<experiment>`` with prompts and embeddings.
        wait: seconds to wait for another process that writes this run.

    Raises:
        RunLocked: another process still writes this run.
        OutOfMemory: memory ran out; the message names the settings that lower what is taken.
        Others: see `set_up` and `train`.
    """
    # An update tells of its own.
    with memory_errors(f"{config.run_name}, outside of its updates", _STATE_REMEDY):
        setup = set_up(config, root, experiment)
        if setup.distribution.is_main:
            _train_recorded(setup, root, wait)
        else:
            # The main process may be waiting for another job's lock.
            setup.distribution.meetings.meet(wait)
            train(setup, run_identity(setup))
            setup.distribution.leave()


def _train_recorded(setup: Setup, root: Path, wait: float) -> None:
    folder = setup.folder

    def outputs() -> list[Path]:
        kept = [
            path for name in ("weights", "updates") for path in sorted((folder / name).rglob("*")) if path.is_file()
        ]
        return [folder / "config.yaml", folder / "metrics.jsonl", *kept]

    with run_lock(folder, wait_seconds=wait):
        setup.distribution.meetings.meet(wait)
        # Now, as the record does: the code on disk may be another one when the run ends.
        ours = packages([code_identity()])
        identity = run_identity(setup)
        set_aside_other(setup, identity)
        read = [prompts_path(setup.experiment), embeddings_path(setup.experiment), *setup.weight_inputs.values()]
        with record_stage(
            "train",
            folder,
            inputs=read,
            outputs=outputs,
            config=setup.config.training_identity(),
            seeds=[setup.config.seed],
            root=root,
            processes=identities(setup.rewards),
        ) as facts:
            made_by = train(setup, identity)
            # In the usual case one code made them all, that of the record.
            if packages(made_by) != ours:
                facts["updates_made_by"] = made_by
            setup.distribution.leave()
