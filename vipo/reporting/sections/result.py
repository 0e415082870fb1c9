"""The first screen: a verdict that a person can repeat, beside the pictures that it is about."""

from typing import Any

from vipo.evaluation.statistics import decimals
from vipo.reporting.sections.context import Page, Section
from vipo.reporting.summary import Summary
from vipo.reporting.verdict import EqualChange, Span
from vipo.reporting.wording import Statement, number, signed

#: Rows and columns of pictures on the first screen.
_PROMPTS, _ARMS = 2, 4
# Differences below this are rounding.
_NOTHING = 1e-9


def result(page: Page) -> Section | None:
    """Verdict, side effects, the first held-out prompts, then everything else that was compared."""
    summary = page.summary
    if not summary.headline:
        return None
    arms = shown_arms(page)
    main = next(iter(summary.equal_change), None)
    return Section(
        "result",
        "Result",
        {
            "verdict": _at_equal_change(summary, main) if main else _at_the_end(summary, summary.headline[0]),
            "effects": _effects(summary, main) if main else _effects_at_the_end(summary),
            "arms": arms,
            "prompts": [
                {"id": prompt.id, "text": prompt.text, "shots": [prompt.first(arm) for arm in arms]}
                for prompt in page.gallery.prompts[:_PROMPTS]
            ],
            "gallery": page.gallery,
            "columns": summary.columns,
            "findings": _findings(summary),
            "side_effects": _side_effects(summary),
            "caveats": summary.caveats,
        },
    )


def shown_arms(page: Page) -> list[str]:
    """The arms beside each other on the first screen: base, GRPO, then those whose credit is no control."""
    summary, arms = page.summary, page.gallery.arms
    focus = [*(item.arm for item in summary.equal_change), *(item.arm for item in summary.headline)]
    wanted = dict.fromkeys(["base", "grpo", *focus, *arms])
    count = min(_ARMS, max(3, 2 + len(set(focus))))
    return [arm for arm in wanted if arm in arms][:count]


def method(arm: str) -> str:
    """An arm's name in a sentence."""
    return {"vipo": "ViPO", "grpo": "GRPO", "base": "the base"}.get(arm, arm)


def _at_equal_change(summary: Summary, item: EqualChange) -> dict[str, Any]:
    arm, reference, column = method(item.arm), method(item.reference), summary.columns[item.column]
    if item.share is None:
        digits = decimals(item.difference.estimate, item.difference.low, item.difference.high)
        figure = signed(item.difference.estimate, digits)
        sentence = (f"At equal change of the picture, {arm} differed from {reference} by ", figure, f" in {column}")
        interval = _interval(item.difference, digits)
        note = f"{reference}'s own gain there is not shown, so no share of it is given. "
    else:
        figure = f"{_percent(item.share.estimate)} %"
        sentence = (f"At equal change of the picture, {arm} reached ", figure, f" of {reference}'s gain in {column}")
        interval = f"{_percent(item.share.low)} to {_percent(item.share.high)} %"
        note = ""
    note += (
        f"Read where both arms' pictures are {item.level:.3g} away from the base's (mean absolute pixel difference): "
        f"{arm} at update {item.updates[0]:.0f}, {reference} at {item.updates[1]:.0f}. "
    )
    return {
        "opening": "No difference shown: " if item.word == "not shown" else "",
        "before": sentence[0] if item.word != "not shown" else sentence[0][0].lower() + sentence[0][1:],
        "figure": figure,
        "after": sentence[2],
        "interval": interval,
        "word": item.word,
        "tone": "none" if item.word == "not shown" else item.word,
        "over": _over(item),
        "reach": _reach(item),
        "note": note,
    }


def _percent(share: float) -> str:
    # An integer has no negative zero.
    return number(round(100 * share), 0)


def _at_the_end(summary: Summary, item: Statement) -> dict[str, Any]:
    arm, reference = method(item.arm), method(item.reference)
    shown = item.tone != "none"
    return {
        "opening": "" if shown else "No difference shown: ",
        "before": f"{'After' if shown else 'after'} training, {arm} differs from {reference} by ",
        "figure": signed(item.estimate, item.digits),
        "after": f" in {summary.columns[item.column]}",
        "interval": _interval(Span(item.estimate, item.low, item.high), item.digits),
        "word": item.word if shown else "not shown",
        "tone": item.tone,
        "over": f", {item.note}",
        "reach": "",
        "note": "",
    }


def _over(item: EqualChange) -> str:
    """What the interval is over, as briefly as beside the figure."""
    if item.over_seeds:
        return f", over {min(item.seeds)} seeds and {item.prompts} held-out prompts"
    if set(item.seeds) == {1}:
        seeds = "the one seed of each arm"
    else:
        counts = " and ".join(str(count) for count in dict.fromkeys(item.seeds))
        seeds = f"these {counts} seeds" + (" an arm" if len(set(item.seeds)) == 1 else "")
    return f", over {item.prompts} held-out prompts, for {seeds} only"


def _reach(item: EqualChange) -> str:
    return "" if item.over_seeds else "With so few seeds, no interval here says anything about a new one."


def _interval(span: Span, digits: int) -> str:
    return f"{signed(span.low, digits)} to {signed(span.high, digits)}"


def _effects(summary: Summary, item: EqualChange) -> dict[str, Any]:
    """What nobody rewarded at the same change: both arms against the base, and against each other."""
    arm, reference = method(item.arm), method(item.reference)
    rows: list[dict[str, Any]] = [
        {
            "label": summary.columns[effect.column],
            "cells": [_cell(span) for span in (effect.reference, effect.arm, effect.between)],
        }
        for effect in item.effects
    ]
    told = [(row["label"], row["cells"][-1]["word"]) for row in rows]
    return {
        "title": "Not rewarded, at the same change",
        "heads": [reference, arm, f"{arm} against {reference}"],
        "rows": rows,
        "sentence": _sentence(told, f"than {reference}'s"),
    }


def _effects_at_the_end(summary: Summary) -> dict[str, Any]:
    arms = list(dict.fromkeys(item.arm for item in summary.side_effects))
    found: dict[str, dict[str, Span]] = {}
    for item in summary.side_effects:
        found.setdefault(item.column, {})[item.arm] = Span(item.estimate, item.low, item.high)
    first = summary.headline[0].arm
    rows = [
        {"label": summary.columns[column], "cells": [_cell(spans[arm]) for arm in arms]}
        for column, spans in found.items()
    ]
    told = [(summary.columns[column], _word(spans[first])) for column, spans in found.items() if first in spans]
    return {
        "title": "Not rewarded, against the base",
        "heads": [method(arm) for arm in arms],
        "rows": rows,
        "sentence": _sentence(told, "than the base's"),
    }


def _sentence(told: list[tuple[str, str]], than: str) -> str:
    """Side effects in words: "scene shape and scene were lower than GRPO's"."""
    parts = []
    for word in ("higher", "lower"):
        names = [label for label, found in told if found == word]
        if names:
            parts.append(f"{_listed(names)} {'was' if len(names) == 1 else 'were'} {word} {than}")
    names = [label for label, found in told if found == "not shown"]
    if names:
        parts.append(f"no difference is shown in {_listed(names)}")
    return f"Of what nobody rewarded, {'; '.join(parts)}." if parts else ""


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cell(span: Span) -> dict[str, str]:
    values = [value if abs(value) > _NOTHING else 0.0 for value in (span.estimate, span.low, span.high)]
    # Two digits, as this table is read beside pictures; all of them are in report.json.
    digits = max(1, decimals(*values) - 1)
    word = _word(span)
    return {
        "figure": signed(values[0], digits) if any(values) else "0",
        "interval": _interval(Span(*values), digits) if any(values) else "",
        "word": word,
        "tone": "none" if word == "not shown" else "shift",
    }


def _word(span: Span) -> str:
    return {1: "higher", -1: "lower", 0: "not shown"}[span.against(0)]


def _findings(summary: Summary) -> list[dict[str, Any]]:
    """The statements below the first screen, in groups."""
    groups = [
        ("Trained reward after the last update", summary.headline),
        ("Trained reward, against the base", summary.against_base),
        ("Does it matter where the credit goes?", summary.layout),
    ]
    groups = [group for number, group in enumerate(groups) if number == 0 or group[1] != summary.headline]
    return [{"title": title, "items": items} for title, items in groups if items]


def _side_effects(summary: Summary) -> list[dict[str, Any]]:
    """What happened to each untrained reward, its arms gathered by verdict."""
    effects: dict[str, dict[str, list[str]]] = {}
    for item in summary.side_effects:
        entry = item.arm + item.verdict.removeprefix(item.word)
        effects.setdefault(summary.columns[item.column], {}).setdefault(item.word, []).append(entry)
    order = ("higher", "lower", "no difference shown")
    return [
        {"label": label, "verdicts": [(word, verdicts[word]) for word in order if word in verdicts]}
        for label, verdicts in effects.items()
    ]
