"""The loop: resume, update, log, save, stop."""

import contextlib
import json
import resource
import signal
from pathlib import Path
from typing import Any

import torch

from vipo.config.run import Config
from vipo.errors import Preempted
from vipo.memory import memory_errors
from vipo.provenance import code_identity, record_stage, run_lock
from vipo.signals import handled
from vipo.tracking.progress import progress_bar
from vipo.tracking.rows import Rows
from vipo.tracking.trackers import Trackers
from vipo.training.setup import Setup, embeddings_path, prompts_path, set_up
from vipo.training.sheets import sheet_of
from vipo.training.state import (
    UNKNOWN_CODE,
    check_weights,
    resume,
    run_identity,
    save_state,
    save_weights,
    set_aside_other,
)
from vipo.training.update import update

_UPDATE_REMEDY = (
    "The newest checkpoint is the last good state; lower training.micro_batch or the generator's size, or set "
    "training.gradient_checkpointing=true, training.lora={}, generator.precision=bf16, or distribution.strategy=fsdp "
    "with more processes"
)
_STATE_REMEDY = (
    "That is weights, gradients, AdamW's state, and with objective.kl_weight the reference: set training.lora={}, or "
    "distribution.strategy=fsdp with more processes (each loads the whole network once, so that one device must hold "
    "it), choose a smaller generator, or raise cluster.train.memory_mb where main memory ran out"
)


class Stop:
    """Whether this run was asked to stop, by a signal to any of its processes."""

    def __init__(self, setup: Setup) -> None:
        self._distribution = setup.distribution
        self._signal = 0

    def remember(self, number: int) -> None:
        """Signal `number` arrived here."""
        self._signal = number

    def if_asked(self, finished: int) -> None:
        """All processes stop at the same place, whichever of them the signal reached.

        Raises:
            Preempted: one of them was asked.
        """
        asked = int(self._distribution.largest(self._signal))
        if asked:
            raise Preempted(
                f"stopped by {signal.Signals(asked).name} after update {finished}; "
                "start the same command again to go on from there"
            )


def train(setup: Setup, identity: str) -> list[dict[str, Any]]:
    """Train to the end, resuming where an earlier process stopped; the final weights are in ``<run>/weights``.

    Args:
        setup: the run.
        identity: `run_identity` of it.

    Returns:
        Of the main process, each code that made updates of this run, in order.

    Raises:
        Preempted: SIGTERM or SIGUSR1 arrived; the newest checkpoint holds every finished update.
    """
    training, main, stop = setup.config.training, setup.distribution.is_main, Stop(setup)
    code = code_identity() if main else UNKNOWN_CODE
    with contextlib.ExitStack() as stack:
        stack.enter_context(handled(stop.remember, signal.SIGTERM, signal.SIGUSR1))
        stack.enter_context(setup.distribution.named_hangs())
        # The main process may be setting another configuration's run aside.
        setup.distribution.meet()
        newest = resume(setup, identity)
        done = saved = 0 if newest is None else newest.update
        # A checkpoint of an earlier format does not tell.
        made_by = [] if newest is None else list(newest.state.get("code", [UNKNOWN_CODE]))
        first = None if newest is None else json.loads(newest.state["metrics"].splitlines()[0])["reward/mean"]
        rows = stack.enter_context(Rows(setup.folder, done)) if main else None
        trackers = None
        if rows is not None:
            trackers = stack.enter_context(Trackers(setup.config, setup.folder, rows.history()))
        progress = stack.enter_context(
            progress_bar(
                total=training.updates,
                done=done,
                description=setup.config.run_name,
                unit="update",
                disable=not main,
            )
        )

        def save() -> None:
            state = {}
            if rows is not None:
                rows.flush()
                # The metrics travel with the checkpoint: a workflow that deletes a killed job's outputs loses nothing.
                state = {"identity": identity, "metrics": rows.metrics, "code": made_by}
            save_state(setup, done, state)

        try:
            for number in range(done + 1, training.updates + 1):
                with setup.timer("total"), memory_errors(f"update {number}", _UPDATE_REMEDY):
                    metrics = update(setup, number, stop.if_asked, sheet_of(setup, number))
                done, first = number, metrics["reward/mean"] if first is None else first
                if rows is not None and trackers is not None:
                    timing = _timing(setup)
                    rows.log(number, metrics, timing)
                    with setup.timer("track"):
                        trackers.log(number, metrics | timing)
                    if code["package_sha256"] not in packages(made_by):
                        made_by.append(code)
                progress.set_postfix(
                    # First, so that what a narrow log cuts off is something else.
                    {"reward": f"{first:.3f} -> {metrics['reward/mean']:.3f}"},
                    ratio=f"{metrics['log_ratio/max_before_first_step']:.1e}",
                    clip=f"{metrics['clip/share']:.2f}",
                    grad=f"{metrics['grad/norm']:.2f}",
                    refresh=False,
                )
                progress.update()
                if number in training.save_at:
                    check_weights(setup, number)
                    save_weights(setup, setup.folder / "updates" / f"{number:06d}")
                if number % training.checkpoint_every == 0 or number == training.updates:
                    save()
                    saved = number
                stop.if_asked(number)
        except Preempted:
            if done > saved:
                save()
            raise
        save_weights(setup, setup.folder / "weights")
    return made_by


def packages(made_by: list[dict[str, Any]]) -> list[str | None]:
    """Hashes of the packages that made a run's updates, in order; None for one that is not known."""
    return [made["package_sha256"] for made in made_by]


def _timing(setup: Setup) -> dict[str, float]:
    parts = setup.timer.pop()
    # The last two are of what followed the update before.
    outside = ("time/total", "time/checkpoint", "time/track")
    inside = sum(seconds for name, seconds in parts.items() if name not in outside)
    if setup.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(setup.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return parts | {"time/other": parts["time/total"] - inside, "memory/peak_bytes": float(memory)}


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
            setup.distribution.meet(wait)
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
        setup.distribution.meet(wait)
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
        ) as facts:
            made_by = train(setup, identity)
            # In the usual case one code made them all, that of the record.
            if packages(made_by) != ours:
                facts["updates_made_by"] = made_by
            setup.distribution.leave()
