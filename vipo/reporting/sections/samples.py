"""Every held-out prompt with every arm's sample beside each other, and the data that the page's script reads."""

import math
from typing import Any

from vipo.reporting.gallery import HISTORY_PROMPTS, Shot, ShownPrompt
from vipo.reporting.sections.context import Page, Section
from vipo.reporting.sections.result import method, shown_arms


def samples(page: Page) -> Section | None:
    """Cards in the evaluation's order; the script filters and sorts them and opens one prompt at a time."""
    gallery, summary = page.gallery, page.summary
    if not gallery.prompts:
        return None
    arms = gallery.arms
    trained = next(iter(summary.trained), None)
    updates = sorted({shot.update for prompt in gallery.prompts for shot in prompt.shots if not shot.final} - {0})
    return Section(
        "samples",
        "Samples",
        {
            "gallery": gallery,
            "cards": [_card(prompt, arms, trained) for prompt in gallery.prompts],
            "label": summary.columns[trained] if trained else "",
            "digits": gallery.digits(trained) if trained else 2,
            "sorts": _sorts(page),
            "updates": updates,
            "history": HISTORY_PROMPTS if len(gallery.prompts) > HISTORY_PROMPTS else None,
            "data": _data(page, arms),
        },
    )


def _card(prompt: ShownPrompt, arms: list[str], trained: str | None) -> dict[str, Any]:
    base = prompt.first("base")
    shown = []
    for arm in arms:
        shot = prompt.first(arm)
        score = shot.scores[trained] if trained else None
        gain = None if trained is None or arm == "base" else shot.scores[trained] - base.scores[trained]
        if score is not None and math.isnan(score):
            score = gain = None
        shown.append({"shot": shot, "score": score, "gain": gain})
    return {"id": prompt.id, "text": prompt.text, "shown": shown}


def _sorts(page: Page) -> list[dict[str, Any]]:
    """What cards can be sorted by: gain of what was trained, loss of what was not, of each arm."""
    summary = page.summary
    chosen = [arm for arm in shown_arms(page) if arm != "base"]
    rewards = [column for column in summary.columns if column.startswith("reward/")]
    kinds = [(column, "gain", summary.trained[column] == "higher") for column in summary.trained]
    kinds += [(column, "loss", False) for column in rewards if column not in summary.trained]
    return [
        {
            "value": f"{arm}|{column}|{'down' if descending else 'up'}",
            "text": f"{method(arm)}: largest {kind} in {summary.columns[column]}",
        }
        for column, kind, descending in kinds
        for arm in chosen
    ]


def _data(page: Page, arms: list[str]) -> dict[str, Any]:
    """What the script reads. A null picture is the one that the prompt's card holds already."""
    summary = page.summary
    columns = [column for column in summary.columns if column.startswith("reward/")]

    def entry(shot: Shot, first: bool) -> dict[str, Any]:
        kept = {
            "u": shot.update,
            "o": page.root + shot.original,
            "s": [None if math.isnan(score := shot.scores[column]) else float(f"{score:.5g}") for column in columns],
        }
        if not first:
            media = {"p": shot.picture, "v": shot.veil, "f": shot.film, "m": shot.veiled_film, "w": shot.veiled_picture}
            kept |= {key: value for key, value in media.items() if value is not None}
        return kept

    prompts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for prompt in page.gallery.prompts:
        firsts = [prompt.first(arm) for arm in arms]
        runs = prompts.setdefault(prompt.id, {})
        for shot in prompt.shots:
            runs.setdefault(shot.run, []).append(entry(shot, shot in firsts))
    return {
        "columns": [
            {"key": column, "label": summary.columns[column], "digits": page.gallery.digits(column)}
            for column in columns
        ],
        "trained": next(iter(summary.trained), None),
        "runs": [{"name": shot.run, "arm": shot.arm, "seed": shot.seed} for shot in page.gallery.runs],
        "arms": arms,
        "pixelated": page.gallery.pixelated,
        "size": list(page.gallery.size),
        "prompts": prompts,
    }
