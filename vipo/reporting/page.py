"""The HTML page: the summary's numbers laid out by one autoescaping template."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vipo.config.compose import dump_config
from vipo.config.objective import SurrogateConfig
from vipo.evaluation.statistics import decimals
from vipo.provenance.files import text_lines
from vipo.reporting.figures import ARM_COLORS, PART_COLORS, Plot, time_parts
from vipo.reporting.inputs import Experiment, Run
from vipo.reporting.summary import Summary
from vipo.text import one_line

if TYPE_CHECKING:
    from vipo.reporting.pictures import ShownPrompt

#: Pictures whose longer side is at most this many pixels keep hard pixel edges when the browser enlarges them.
PIXEL_ART_SIDE = 128

_GROUPS = ("forest", "held_out", "change", "matched", "training")


def render_page(
    experiment: Experiment,
    summary: Summary,
    time: pd.DataFrame,
    figures: Sequence[Plot],
    time_figure: Plot | None,
    prompts: "Sequence[ShownPrompt]",
) -> str:
    """The whole page as HTML. Every text is escaped; only the drawn figures are trusted markup."""
    environment = Environment(
        loader=PackageLoader("vipo.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": _signed, "number": _number, "words": _against, "one_line": one_line}
    # What was measured needs torch, the page does not.
    from vipo.reporting.measured import credit_section

    configs = [run.config for run in experiment.runs]
    size = max(configs[0].generator.width, configs[0].generator.height)
    return environment.get_template("report.html.j2").render(
        experiment=experiment.config.experiment,
        summary=summary,
        arm_index={arm: index % len(ARM_COLORS) for index, arm in enumerate(experiment.arms)},
        part_index={part: index % len(PART_COLORS) for index, part in enumerate(time_parts(time))},
        findings=_findings(summary),
        side_effects=_side_effects(summary),
        figures={group: [_drawn(plot) for plot in figures if plot.group == group] for group in _GROUPS},
        time_figure=None if time_figure is None else _drawn(time_figure),
        unrecorded=[run.name for run in experiment.runs if not run.config.is_base and run.timing.empty],
        time=time.to_dict("records"),
        time_parts=time_parts(time),
        comparison=[_comparison(summary, column) for column in summary.columns if column.startswith("reward/")],
        change=_comparisons_of_change(summary),
        matched=_matched(summary),
        prompts=prompts,
        pixelated=size <= PIXEL_ART_SIDE,
        videos=experiment.config.generator.frames is not None,
        wide_reference=any(len(summary.final(column, "grpo")) for column in summary.columns),
        differing=_differing(experiment.runs),
        configurations=_configurations(experiment.runs),
        checks=_checks(experiment),
        credit=credit_section(experiment.folder, experiment.config.experiment.meter),
        provenance=[_provenance(run) for run in experiment.runs if not run.config.is_base],
        manifest=json.dumps(experiment.manifest, indent=2, sort_keys=True, ensure_ascii=False),
    )


def _drawn(plot: Plot) -> dict[str, Any]:
    return {"title": plot.title, "caption": plot.caption, "svg": Markup(plot.svg)}


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _against(verdict: str, reference: str) -> str:
    """A verdict with its reference: "better by 0.1 than base", "no difference shown against base"."""
    return f"{verdict} {'than' if ' by ' in verdict else 'against'} {reference}"


def _findings(summary: Summary) -> list[dict[str, Any]]:
    """The statements below the headline, in groups."""
    groups = [
        ("Trained reward, against the base", summary.against_base),
        ("Does it matter where the credit goes?", summary.layout),
    ]
    return [{"title": title, "items": items} for title, items in groups if items and items != summary.headline]


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


def _comparison(summary: Summary, column: str) -> dict[str, Any]:
    rows = [
        {
            "arm": row["arm"],
            "seeds": row["seed_count"],
            "mean": row[column],
            "base": summary.final(column, "base").get(row["arm"]),
            "grpo": summary.final(column, "grpo").get(row["arm"]),
        }
        for row in summary.arms.to_dict("records")
    ]
    return {
        "label": summary.columns[column],
        "trained": column in summary.trained,
        "digits": decimals(*(row["mean"] for row in rows)),
        "rows": rows,
    }


def _comparisons_of_change(summary: Summary) -> dict[str, Any]:
    columns = [column for column in summary.columns if column.startswith("change/")]
    split = {"change/foreground", "change/background"} <= set(columns)
    rows = []
    for row in summary.arms.to_dict("records"):
        if row["arm"] == "base":
            continue
        background = row["change/background"] if split else math.nan
        rows.append(
            {
                "arm": row["arm"],
                "cells": [summary.final(column, "base").get(row["arm"]) for column in columns],
                "ratio": row["change/foreground"] / background if split and background > 0 else None,
            }
        )
    return {"labels": [summary.columns[column] for column in columns], "split": split, "rows": rows}


def _matched(summary: Summary) -> list[dict[str, Any]]:
    """One block per held-equal column: its level and the arms' values there, seeds beside the mean."""
    blocks = []
    for on, table in summary.matched.groupby("on", sort=False):
        columns = [column for column in summary.columns if column != on]
        means = table[table["seed"].isna()]
        digits = {column: _column_digits(means[column]) for column in columns}
        rows = []
        for row in means.to_dict("records"):
            seeds = table[(table["arm"] == row["arm"]) & table["seed"].notna() & table["reached"].astype(bool)]
            total = int((summary.seed_curves[summary.seed_curves["arm"] == row["arm"]])["seed"].nunique())
            rows.append(
                {
                    "arm": row["arm"],
                    "reached": bool(row["reached"]),
                    "update": row["update"],
                    "values": [
                        {"mean": row[column], "seeds": [float(value) for value in seeds[column]]} for column in columns
                    ],
                    "seeds_reached": len(seeds),
                    "seeds": total,
                }
            )
        level = float(means["level"].iloc[0])
        blocks.append(
            {
                "label": summary.columns[str(on)],
                "level": None if math.isnan(level) else level,
                "level_digits": 3 if math.isnan(level) else decimals(level),
                "labels": [summary.columns[column] for column in columns],
                "digits": [digits[column] for column in columns],
                "rows": rows,
            }
        )
    return blocks


def _column_digits(values: "pd.Series[float]") -> int:
    return decimals(*(float(value) for value in values.dropna()))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {key: text for name, part in value.items() for key, text in _flat(part, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): json.dumps(value, ensure_ascii=False)}


def _differing(runs: Sequence[Run]) -> dict[str, Any]:
    """Settings that are not the same in all trained runs; the arm's name and seed are known already."""
    trained = [run for run in runs if not run.config.is_base]
    flat = {
        run.name: _flat(run.config.model_dump(mode="json", exclude={"experiment", "arm", "seed"})) for run in trained
    }
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = [
        {"key": key, "values": [values.get(key, "—") for values in flat.values()]}
        for key in keys
        if len({values.get(key) for values in flat.values()}) > 1
    ]
    return {"runs": [{"name": run.name, "arm": run.config.arm} for run in trained], "rows": rows}


def _configurations(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's YAML by lines, marked where it is not the first run's."""
    texts = [text_lines(dump_config(run.config)) for run in runs]
    reference = texts[0]
    result = []
    for run, lines in zip(runs, texts, strict=True):
        matcher = difflib.SequenceMatcher(a=reference, b=lines, autojunk=False)
        marked = [
            {"text": line, "differs": kind != "equal"}
            for kind, _, _, start, end in matcher.get_opcodes()
            for line in lines[start:end]
        ]
        result.append({"run": run.name, "arm": run.config.arm, "lines": marked})
    return result


_NOISE = "log_ratio/rms_before_first_step"


def _checks(experiment: Experiment) -> list[dict[str, Any]]:
    """What must hold for the comparison to mean something, and whether the records say that it did."""
    trained = [run for run in experiment.runs if not run.config.is_base]
    checks = []
    key = "log_ratio/max_before_first_step"
    # An objective without a ratio has nothing to compare.
    compared = [run for run in trained if key in run.metrics or isinstance(run.config.objective, SurrogateConfig)]
    if compared:
        largest = max((float(run.metrics[key].max()) for run in compared if key in run.metrics), default=math.nan)
        noise = max((float(run.metrics[_NOISE].max()) for run in compared if _NOISE in run.metrics), default=math.nan)
        tolerance = min(run.config.training.log_ratio_tolerance for run in compared)
        checks.append(
            {
                "ok": largest <= tolerance,
                "text": f"Rollout and update are the same policy: max |log ρ| before the first step is {largest:.1e} "
                f"(tolerance {tolerance:.0e}), its root mean square {noise:.1e}.",
            }
        )
    done = {run.name: int(run.metrics["update"].max()) for run in trained}
    short = [run.name for run in trained if done[run.name] != run.config.training.updates]
    checks.append(
        {
            "ok": not short,
            "text": "Every run made all of its updates."
            if not short
            else "Fewer updates than configured: " + ", ".join(f"{name} {done[name]}" for name in short) + ".",
        }
    )
    constant = [
        float(run.metrics["map/constant_share"].mean()) for run in trained if "map/constant_share" in run.metrics
    ]
    if constant:
        checks.append(
            {
                "ok": max(constant) < 0.05,
                "text": "Maps without structure (they fall back to plain GRPO): at most "
                f"{100 * max(constant):.1f} % of a run's samples.",
            }
        )
    mapped = [run.config.perception for run in trained if run.config.credit.reads_backbone]
    from vipo.perception.backbones import NOT_MEASURED, registered_evidence

    evidence = {told for config in mapped if (told := registered_evidence(config)) is not None}
    if evidence:
        checks.append(
            {
                "ok": NOT_MEASURED not in evidence,
                "text": "That the rule of orientation puts the maps on the object rather than on its background: "
                f"{'; '.join(sorted(evidence))}.",
            }
        )
    records = [run.provenance for run in trained if run.provenance is not None]
    absent = [run.name for run in trained if run.provenance is None]
    if absent:
        checks.append(
            {
                "ok": False,
                "text": f"Records of the training are not here for {', '.join(absent)}: which code and machine made "
                "these runs is not recorded here.",
            }
        )
        return checks
    made_by = [made for record in records for made in record.get("updates_made_by", [])]
    packages = {record.get("package_sha256") for record in (*records, *made_by)}
    states = [record.get(key) or {} for record in records for key in ("git", "checkout")]
    dirty = any(state.get("dirty") for state in (*states, *made_by))
    checks.append(
        {
            "ok": len(packages) == 1,
            "text": "All runs were trained by the same vipo package."
            if len(packages) == 1
            else f"Runs were trained by {len(packages)} different versions of the vipo package.",
        }
    )
    checks.append(
        {
            "ok": not dirty,
            "text": "The working tree had uncommitted changes."
            if dirty
            else "No run was trained from a working tree with uncommitted changes.",
        }
    )
    return checks


def _provenance(run: Run) -> dict[str, Any]:
    record = run.provenance or {}
    hardware = record.get("hardware") or {}
    facts = {
        "Command": _plain(record.get("command")),
        "Started": _plain(record.get("started")),
        "Ended": _plain(record.get("ended")),
        "Commit": _commit(record.get("git") or {}),
        **({"Commit of the configuration": _commit(record["checkout"])} if "checkout" in record else {}),
        "Package SHA-256": _plain(record.get("package_sha256")),
        **({"Updates made by": _packages(record["updates_made_by"])} if "updates_made_by" in record else {}),
        "Lock SHA-256": _plain(record.get("lock_sha256")),
        "Installed SHA-256": _plain(record.get("installed_sha256")),
        "Container digest": _plain(record.get("container_digest")),
        "Hardware": ", ".join(f"{key} {_plain(value)}" for key, value in hardware.items()) or "not recorded",
        "Versions": ", ".join(f"{key} {_plain(value)}" for key, value in (record.get("versions") or {}).items())
        or "not recorded",
    }
    files = [
        {"role": role, "path": str(entry["path"]), "bytes": entry["bytes"], "sha256": str(entry["sha256"])}
        for role in ("inputs", "outputs")
        for entry in record.get(role, [])
    ]
    return {"run": run.name, "arm": run.config.arm, "facts": facts, "files": files}


def _commit(git: Mapping[str, Any]) -> str:
    return _plain(git.get("commit")) + (" with uncommitted changes" if git.get("dirty") else "")


def _packages(made_by: Sequence[Mapping[str, Any]]) -> str:
    return ", then ".join(f"{_plain(made['package_sha256'])} (commit {_commit(made)})" for made in made_by)


def _plain(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)
