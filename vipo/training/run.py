"""The loop: resume, update, log, save, stop."""

import contextlib
import json
import resource
import signal
from typing import Any

import torch

from vipo.errors import Preempted
from vipo.memory import memory_errors
from vipo.provenance import code_identity
from vipo.provenance.files import text_lines
from vipo.signals import handled
from vipo.tracking.progress import progress_bar
from vipo.tracking.rows import Rows
from vipo.tracking.trackers import Trackers
from vipo.training.alarms import AlarmRaised, Alarms
from vipo.training.checkpoints import Checkpoint
from vipo.training.setup import Setup
from vipo.training.sheets import sheet_of
from vipo.training.state import UNKNOWN_CODE, check_weights, resume, save_state, save_weights
from vipo.training.stop import Stop
from vipo.training.update import update

_UPDATE_REMEDY = (
    "The newest checkpoint is the last good state; lower training.micro_batch or the generator's size, or set "
    "training.gradient_checkpointing=true, training.lora={}, generator.precision=bf16, or distribution.strategy=fsdp "
    "with more processes"
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
        AlarmRaised: a bound of section `alarms` is broken; so does it then.
    """
    training, main, stop = setup.config.training, setup.distribution.is_main, Stop(setup)
    code = code_identity() if main else UNKNOWN_CODE
    with contextlib.ExitStack() as stack:
        stack.enter_context(handled(stop.remember, signal.SIGTERM, signal.SIGUSR1))
        stack.enter_context(setup.distribution.meetings.named_hangs())
        # The main process may be setting another configuration's run aside.
        setup.distribution.meetings.meet()
        newest = resume(setup, identity)
        done = saved = 0 if newest is None else newest.update
        # A checkpoint of an earlier format does not tell.
        made_by = [] if newest is None else list(newest.state.get("code", [UNKNOWN_CODE]))
        first = None if newest is None else _metrics(newest)[0]["reward/mean"]
        alarms = Alarms(setup.config.alarms.stop, () if newest is None else _metrics(newest))
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
            alarms.check()
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
                progress.set_postfix(_shown(first, metrics), refresh=False)
                progress.update()
                if number in training.save_at:
                    check_weights(setup, number)
                    save_weights(setup, setup.folder / "updates" / f"{number:06d}")
                if number % training.checkpoint_every == 0 or number == training.updates:
                    save()
                    saved = number
                alarms.see({"update": number, **metrics})
                alarms.check()
                stop.if_asked(number)
        except (Preempted, AlarmRaised):
            if done > saved:
                save()
            raise
        save_weights(setup, setup.folder / "weights")
    return made_by


def packages(made_by: list[dict[str, Any]]) -> list[str | None]:
    """Hashes of the packages that made a run's updates, in order; None for one that is not known."""
    return [made["package_sha256"] for made in made_by]


def _metrics(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text_lines(checkpoint.state["metrics"])]


def _shown(first: float, metrics: dict[str, float]) -> dict[str, str]:
    # First, so that what a narrow log cuts off is something else.
    reward = {"reward": f"{first:.3f} -> {metrics['reward/mean']:.3f}"}
    others = {
        "ratio": ("log_ratio/max_before_first_step", ".1e"),
        "clip": ("clip/share", ".2f"),
        "grad": ("grad/norm", ".2f"),
    }
    return reward | {short: format(metrics[name], form) for short, (name, form) in others.items() if name in metrics}


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
