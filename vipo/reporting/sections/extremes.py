"""Best and worst, drawn by rule: the largest gains of what was trained, the worst losses of what was not."""

from typing import Any

from vipo.reporting.sections.context import Page, Section
from vipo.reporting.sections.result import shown_arms

_SHOWN = 4


def extremes(page: Page) -> Section | None:
    """Of each arm of the first screen the four prompts that gained, and that lost, most against the base."""
    summary, prompts = page.summary, page.gallery.prompts
    arms = [arm for arm in shown_arms(page) if arm != "base"]
    if not prompts or not arms:
        return None
    rewards = [column for column in summary.columns if column.startswith("reward/")]
    kinds = [
        (column, "Largest gains in", 1 if better == "higher" else -1) for column, better in summary.trained.items()
    ]
    kinds += [(column, "Worst losses in", -1) for column in rewards if column not in summary.trained]
    blocks = []
    for column, title, sign in kinds:
        rows = [{"arm": arm, "shown": _ranked(page, arm, column, sign)} for arm in arms]
        blocks.append(
            {
                "title": f"{title} {summary.columns[column]}",
                "digits": page.gallery.digits(column),
                "rows": [row for row in rows if row["shown"]],
            }
        )
    blocks = [block for block in blocks if block["rows"]]
    if not blocks:
        return None
    values = {"blocks": blocks, "gallery": page.gallery, "prompts": len(prompts), "shown": _SHOWN}
    return Section("extremes", "Best and worst", values)


def _ranked(page: Page, arm: str, column: str, sign: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for prompt in page.gallery.prompts:
        base, shot = prompt.first("base"), prompt.first(arm)
        moved = shot.scores[column] - base.scores[column]
        if sign * moved > 0:
            found.append({"prompt": prompt, "base": base, "shot": shot, "moved": moved})
    return sorted(found, key=lambda item: -sign * item["moved"])[:_SHOWN]
