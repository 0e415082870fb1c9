"""Sheets of an update's first samples, for people who watch a run."""

import functools
import logging
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from vipo.provenance.files import StorageError, atomic_file
from vipo.tracking.trackers import sheet_path
from vipo.training.rollouts import Rollouts
from vipo.training.setup import Setup
from vipo.training.update import Show

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
    for _, drawn in sorted(own.items())[:_GROUPS]:
        rows = sorted(drawn, key=lambda pair: rollouts.samples[pair[0]].index)[:_SAMPLES]
        stills = [picture[len(picture) // 2] if picture.ndim == 4 else picture for _, picture in rows]
        maps = None if weights is None else [_still_map(weights[row], clip=picture.ndim == 4) for row, picture in rows]
        groups.append(
            ShownGroup(
                rollouts.samples[rows[0][0]].prompt.text,
                torch.stack(stills).float().cpu(),
                None if maps is None else torch.stack(maps).float().cpu(),
            )
        )
    sheet = sample_sheet(groups)
    try:
        with atomic_file(path) as partial:
            sheet.save(partial, format="PNG", compress_level=1)
    except StorageError as error:
        log.warning("%s The run goes on without this sheet.", error)


def _still_map(weights: Tensor, *, clip: bool) -> Tensor:
    """``(H, W)`` of a sample's weights ``([S,] [T,] H, W)``: the mean over transitions, of a clip in its middle.

    Latent frame ``T // 2`` covers frame ``T // 2`` of the pictures.
    """
    over_transitions = weights.mean(dim=0) if weights.ndim == (4 if clip else 3) else weights
    return over_transitions[len(over_transitions) // 2] if clip else over_transitions
