"""Sheets of an update's first samples, for people who watch a run."""

import functools
import logging
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from vipo.provenance.files import StorageError, atomic_file
from vipo.tracking.trackers import sheet_path
from vipo.training.setup import Setup
from vipo.training.update import Rollouts, Show

log = logging.getLogger(__name__)

# A sheet is looked at, not studied.
_GROUPS, _SAMPLES = 4, 8


def sheet_of(setup: Setup, number: int) -> Show | None:
    """What draws the sheet of an update, called within it; None where it is not its turn, or not this process's."""
    every = setup.config.tracking.sheet_every
    if every is None or (number != 1 and number % every) or not setup.distribution.is_main:
        return None
    return functools.partial(_draw, sheet_path(setup.folder, number))


def _draw(path: Path, rollouts: Rollouts, weights: Tensor | None) -> None:
    """Of the first prompts the first samples that this process drew; nothing is asked of the others."""
    from vipo.maps.sheet import ShownGroup, sample_sheet

    own: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for row, picture in zip(rollouts.rows, rollouts.pictures, strict=True):
        own[rollouts.samples[row].group].append((row, picture))
    groups = []
    for _, found in sorted(own.items())[:_GROUPS]:
        rows = sorted(found, key=lambda pair: rollouts.samples[pair[0]].index)[:_SAMPLES]
        groups.append(
            ShownGroup(
                rollouts.samples[rows[0][0]].prompt.text,
                torch.stack([_still(picture, 3).float().cpu() for _, picture in rows]),
                None if weights is None else torch.stack([_still(weights[row], 2).float().cpu() for row, _ in rows]),
            )
        )
    sheet = sample_sheet(groups)
    try:
        with atomic_file(path) as partial:
            sheet.save(partial, format="PNG", compress_level=1)
    except StorageError as error:
        log.warning("%s The run goes on without this sheet.", error)


def _still(sample: Tensor, dimensions: int) -> Tensor:
    """Of a clip's frames or maps, or of the maps of its transitions, the one in the middle: latent frame ``T // 2``
    covers frame ``T // 2``."""
    while sample.ndim > dimensions:
        sample = sample[len(sample) // 2]
    return sample
