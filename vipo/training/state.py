"""A run on disk: what identifies it, what it goes on from, and what it keeps."""

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from vipo.config.compose import dump_config
from vipo.config.training import EMA
from vipo.config.values import config_hash
from vipo.provenance.files import atomic_file, atomic_folder, file_sha256, text_lines
from vipo.provenance.records import checkpoint_files
from vipo.provenance.superseded import is_finished, set_aside
from vipo.rewards import identities
from vipo.training.checkpoints import (
    Checkpoint,
    check_optimizer,
    check_state,
    check_tensors,
    load_newest,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    prune_checkpoints,
    save_checkpoint,
)
from vipo.training.errors import TrainingError
from vipo.training.setup import Setup, embeddings_path, prompts_path
from vipo.training.stored import CheckpointError, own_rows

log = logging.getLogger(__name__)

UNKNOWN_CODE: dict[str, Any] = {"package_sha256": None, "commit": None, "dirty": None}
"""Of updates whose code is not known."""


def run_identity(setup: Setup) -> str:
    """Hash of everything that decides the run's result; a checkpoint of another identity is never resumed.

    The weights of a large generator take a while to read.
    """
    paths = (prompts_path(setup.experiment), embeddings_path(setup.experiment))
    inputs = {path.name: file_sha256(path) for path in paths}
    inputs |= {name: content_hash(path) for name, path in setup.weight_inputs.items()}
    inputs |= {f"reward process {label}": config_hash(told) for label, told in identities(setup.rewards).items()}
    return config_hash({"config": setup.config.training_identity(), "inputs": inputs})


def content_hash(path: Path) -> str:
    """Hash of a file, or of the weights and configurations of a folder."""
    # Configurations too: a scheduler's or an autoencoder's numbers decide the chain and the pictures. How the folder
    # was made decides nothing.
    return config_hash([[str(file.relative_to(path)), file_sha256(file)] for file in checkpoint_files(path)])


def checkpoints_folder(setup: Setup) -> Path:
    """Where the run's checkpoints are."""
    return setup.folder / "checkpoints"


def _newest(setup: Setup, identity: str) -> Checkpoint | None:
    return load_newest(checkpoints_folder(setup), lambda checkpoint: _check(setup, identity, checkpoint))


def _check(setup: Setup, identity: str, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that cannot be gone on from, although its bytes are those of its manifest.

    Of a run of another configuration the tensors may be any: it is set aside.
    """
    what = f"checkpoint {checkpoint.update} of {setup.config.run_name}"
    check_state(checkpoint, {"identity": str, "metrics": str, "config": str})
    try:
        rows = [json.loads(line) for line in text_lines(checkpoint.state["metrics"])]
        told = [row["update"] for row in rows]
        codes = [dict(code)["package_sha256"] for code in checkpoint.state.get("code", [UNKNOWN_CODE])]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{what}: damaged (its metrics or code: {type(error).__name__}: {error})") from error
    if told != list(range(1, checkpoint.update + 1)) or not codes:
        raise CheckpointError(f"{what}: damaged (its metrics are not those of updates 1 to {checkpoint.update})")
    if checkpoint.state["identity"] == identity:
        tensors, count = checkpoint.tensors, checkpoint.state.get("optimizer_tensors")
        check_tensors(tensors.below("network"), setup.trainable, what)
        for name, policy in setup.kept.items():
            check_tensors(tensors.below(f"kept/{name}"), policy.tensors, what)
        check_optimizer(tensors.below("optimizer"), setup.optimizer, count, what)


def set_aside_other(setup: Setup, identity: str) -> None:
    """Move a run that cannot be gone on from out of the folder, so that a fresh one can start beside it.

    It is of another configuration or other inputs, or finished and without its checkpoints or a part of its weights.
    """
    newest, folder = _newest(setup, identity), setup.folder
    why = "came without checkpoints"
    if newest is not None:
        lost = _lost(setup, newest)
        why = f"lacks the kept weights of update {lost}"
        if newest.state["identity"] != identity:
            why = "was made by another configuration or other inputs"
        elif not (lost and is_finished(folder, "train")):
            return
        # What a workflow deleted before it started this process.
        for text, file in ((newest.state["metrics"], "metrics.jsonl"), (newest.state["config"], "config.yaml")):
            if not (folder / file).is_file():
                (folder / file).write_text(text, encoding="utf-8")
    elif not is_finished(folder, "train"):
        return
    aside = set_aside(setup.experiment, [folder])
    log.warning("%s %s: set aside in %s, a fresh run starts", folder, why, aside)


def resume(setup: Setup, identity: str) -> Checkpoint | None:
    """Take up the newest sound checkpoint: weights and optimizer as it has them. None: the run starts at update 1.

    Every process of the run calls it.

    Raises:
        TrainingError: the processes do not see the same checkpoint and inputs.
    """
    newest = _resumable(setup, identity)
    start = 0 if newest is None else newest.update
    views = setup.distribution.everyones([start, identity])
    if any(view != views[0] for view in views):
        raise TrainingError(
            f"{checkpoints_folder(setup)}: the processes do not see the same newest checkpoint and inputs (update and "
            f"identity by rank: {views}); put results and inputs on a disk that all nodes share"
        )
    if newest is not None:
        weights = newest.tensors.below("network")
        with torch.no_grad():
            for name, value in setup.trainable.items():
                value.copy_(weights.like(name, value))
        for name, policy in setup.kept.items():
            policy.restore(newest.tensors.below(f"kept/{name}"))
        load_optimizer_tensors(setup.optimizer, newest.tensors.below("optimizer"))
        log.info("%s: resumed after update %d of %d", setup.config.run_name, start, setup.config.training.updates)
    if setup.distribution.is_main:
        _begin(setup, newest)
    return newest


def _resumable(setup: Setup, identity: str) -> Checkpoint | None:
    newest = _newest(setup, identity)
    if newest is None:
        return None
    if lost := _lost(setup, newest):
        log.warning("%s: the kept weights of update %s are gone; the run starts again", setup.folder, lost)
        return None
    return newest


def _lost(setup: Setup, newest: Checkpoint) -> str:
    """Updates whose weights were kept and are not there, although the run got further; "" for none."""
    kept = [update for update in setup.config.training.save_at if update <= newest.update]
    return ", ".join(str(update) for update in kept if not (setup.folder / "updates" / f"{update:06d}").is_dir())


def _begin(setup: Setup, newest: Checkpoint | None) -> None:
    folder = setup.folder
    if newest is None:
        # Kept weights of a run that was cut off before its first checkpoint are not this one's.
        shutil.rmtree(folder / "updates", ignore_errors=True)
    # An output of every run, whether or not training.save_at fills it.
    (folder / "updates").mkdir(exist_ok=True)
    with atomic_file(folder / "metrics.jsonl") as path:
        path.write_text("" if newest is None else newest.state["metrics"], encoding="utf-8")
    with atomic_file(folder / "config.yaml") as path:
        path.write_text(dump_config(setup.config), encoding="utf-8")


def save_state(setup: Setup, update: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of `update`; every process calls it.

    Args:
        state: of the main process, beside the tensors: identity, metrics, codes.

    Raises:
        TrainingError: a weight is not finite.
        StorageError: the disk is full; the last good checkpoint stays.
    """
    with setup.timer("checkpoint"):
        check_weights(setup, update)
        moments = optimizer_tensors(setup.optimizer)
        tensors = prefixed("network", dict(setup.trainable)) | prefixed("optimizer", moments)
        for name, policy in setup.kept.items():
            tensors |= prefixed(f"kept/{name}", policy.tensors)
        whole = state | {"config": dump_config(setup.config), "optimizer_tensors": len(moments)} if state else {}
        save_checkpoint(checkpoints_folder(setup), update, tensors, whole, setup.distribution)
        if setup.distribution.is_main:
            prune_checkpoints(checkpoints_folder(setup), update, setup.config.training.keep_checkpoints)
        # A process that ends before the checkpoint is there might be taken for a failure that ends the others.
        setup.distribution.meetings.meet()


def check_weights(setup: Setup, number: int) -> None:
    """Refuse to keep weights that are not finite: every later step would start from them.

    Raises:
        TrainingError: a tensor is not finite; the message names it.
    """
    finite = {name: own_rows(value)[0].isfinite().all() for name, value in setup.trainable.items()}
    found = [name for name, sound in finite.items() if not bool(sound)]
    bad = [name for names in setup.distribution.everyones(found) for name in names]
    if bad:
        raise TrainingError(
            f"update {number}: the weights are not finite after it, first {bad[0]!r}; nothing of them was kept, "
            "and the newest checkpoint is the last good state. A lower optimizer.learning_rate helps"
        )


def save_weights(setup: Setup, folder: Path) -> None:
    """Write the network as stock diffusers loads it, and below it in `EMA` the mean of the weights, where it is kept.

    Every process calls it.
    """
    wrapped = setup.generator.network
    setup.generator.network = setup.distribution.unwrap(wrapped)
    with atomic_folder(folder) if setup.distribution.is_main else contextlib.nullcontext() as temporary:
        _write_network(setup, temporary)
        if EMA in setup.kept:
            with setup.kept[EMA].instead():
                _write_network(setup, None if temporary is None else temporary / EMA)
    setup.generator.network = wrapped


def _write_network(setup: Setup, folder: Path | None) -> None:
    state = setup.distribution.full_state(setup.generator.network)
    if folder is not None:
        setup.generator.save_network(folder, state)
