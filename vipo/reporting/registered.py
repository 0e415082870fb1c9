"""A registered experiment's results: every measure by run, the tests, the rule's verdict and one picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vipo.config.registered import RegisteredConfig
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.evaluation.left_out import left_out, on_common_samples
from vipo.evaluation.registered import DECIDING, Analysis, Verdict, analyse
from vipo.provenance.files import atomic_file
from vipo.reporting.drawing import INK, WIDTH, Arms, Plot, as_plot, bare_rows, new_row
from vipo.reporting.inputs import ReportError, read_scores
from vipo.text import one_line

_SHOWN = 5


def write_registered(config: Config, results: Path, output: Path) -> list[Path]:
    """The registered measures of an experiment whose runs are all evaluated.

    Scores are read as they were written: a run's own configuration may be of an older vipo.

    Args:
        config: of the experiment as it is registered, any run.
        results: folder of all experiments' results.
        output: folder for ``<experiment>.json`` (tests and verdict), ``.csv`` (measures of every run), ``.md`` and
            ``.svg``.

    Returns:
        The files.

    Raises:
        ConfigError: the experiment has no section `registered`.
        ReportError: a run is not evaluated yet (nothing is told before all are), or a file is damaged.
        ScoresError: runs cannot be compared.
    """
    experiment, rule = config.experiment, config.experiment.registered
    if rule is None:
        raise ConfigError(f"experiment {experiment.name!r} has no section 'registered': no measures were fixed for it")
    folder = results / experiment.name
    runs = [
        config.model_copy(update={"arm": arm, "seed": seed})
        for arm, own in experiment.arms.items()
        for seed in own.seeds
    ]
    scores, lost = on_common_samples(_all_scores(runs, folder))
    used = dict.fromkeys((rule.reward, rule.change, *rule.side_effects))
    if gone := [name for name in used if name in lost]:
        raise ReportError(
            f"{folder / 'evaluation'}: fewer than two prompts have a score of {', '.join(gone)} in every run; see why "
            "it scores so few, and evaluate again"
        )
    missing = {name: count for name in used if name in scores and (count := left_out(scores, name))}
    found = analyse(scores, rule, config.evaluation.confidence)
    updates = sorted(int(update) for update in scores["update"].unique())
    facts = {
        "experiment": experiment.name,
        "commits": _commits(runs, folder),
        "updates": updates,
        "held_out_samples": int((scores["update"] == 0).sum()),
        **({"left_out": missing} if missing else {}),
        "confidence": config.evaluation.confidence,
        "rule": rule.model_dump(mode="json"),
        **found.decision(),
        "tests": _rows(found.tests),
    }
    plot = _forest(experiment.name, found.tests, list(experiment.arms), config.evaluation.confidence)
    contents = {
        "json": json.dumps(facts, indent=1, allow_nan=False) + "\n",
        "csv": found.runs.to_csv(index=False, lineterminator="\n", float_format="%.6g"),
        "md": _page(config, rule, found, facts, plot),
        "svg": plot.standalone(),
    }
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{experiment.name}.{ending}" for ending in contents]
    for path, text in zip(paths, contents.values(), strict=True):
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return paths


def _all_scores(runs: Sequence[Config], folder: Path) -> pd.DataFrame:
    files = [folder / "evaluation" / run.run_name / "scores.parquet" for run in runs]
    if missing := [run.run_name for run, path in zip(runs, files, strict=True) if not path.is_file()]:
        named = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise ReportError(
            f"{folder / 'evaluation'}: {len(missing)} of {len(runs)} runs are not evaluated ({named}); "
            "registered measures are told when all are"
        )
    return pd.concat([read_scores(path, run) for path, run in zip(files, runs, strict=True)], ignore_index=True)


def _commits(runs: Sequence[Config], folder: Path) -> list[str]:
    """What the trained runs say that they were trained at."""
    found = set()
    for run in runs:
        record = folder / "runs" / run.run_name / "provenance.json"
        if record.is_file():
            try:
                git = json.loads(record.read_text(encoding="utf-8"))["git"]
                found.add(f"{git['commit']}{' (changed)' if git['dirty'] else ''}")
            except (ValueError, KeyError, TypeError) as error:
                raise ReportError(f"{record}: names no commit ({error!r}); train the run again") from error
    return sorted(found)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(key): None if isinstance(value, float) and pd.isna(value) else value for key, value in row.items()}
        for row in table.to_dict("records")
    ]


def _forest(name: str, tests: pd.DataFrame, arms: list[str], confidence: float) -> Plot:
    """Differences to the references by both deciding measures, with intervals."""
    drawn, colours = tests.drop_duplicates(["role", "arm", "reference"]), Arms(arms)
    figure, panels = new_row(len(DECIDING), 0.8 + 0.24 * len(drawn), 2.2 * WIDTH)
    for axes, measure in zip(panels, DECIDING, strict=True):
        own = tests[tests["measure"] == measure]
        for place, row in enumerate(own.to_dict("records")):
            colour = colours.color(row["arm"])
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.0, solid_capstyle="round")
            axes.plot(row["difference"], place, marker=colours.marker(row["arm"]), color=colour, markersize=4.6)
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.55, dashes=(3, 2))
        axes.set_xlabel(f"difference of the {measure}")
        bare_rows(axes)
    labels = [f"{row['arm']} - {row['reference']} ({row['role']})" for row in drawn.to_dict("records")]
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    title = f"Registered measures of {name}"
    return as_plot(figure, name, "registered", title, f"{confidence:.0%} intervals over seeds", title)


def _page(config: Config, rule: RegisteredConfig, found: Analysis, facts: dict[str, Any], plot: Plot) -> str:
    name = config.experiment.name
    lines = [
        f"# Results of `{name}`",
        "",
        f"Made by `vipo registered {name}`; nothing here is written by hand. What was asked and the rule: "
        "[registered.md](../registered.md). Every number in full, and every run's: "
        f"[{name}.json]({name}.json), [{name}.csv]({name}.csv).",
        "",
        f"**{one_line(config.experiment.question)}**",
        "",
        f"Trained at commit {', '.join(facts['commits']) or 'unknown'}; {facts['held_out_samples']} held-out samples "
        f"at updates {', '.join(map(str, facts['updates']))}.",
        "",
    ]
    for metric, count in facts.get("left_out", {}).items():
        lines.append(f"- Of `{metric}`, {count} of the samples have no score in some run and are left out of all.")
    if not found.learned:
        lines.append(
            "- **Nothing was learned**: in no arm did the reward rise above the base's, by its area at equal updates."
        )
    lines += [f"- {_sentence(family, verdict, rule, found)}" for family, verdict in found.families.items()]
    if rule.controls:
        passing = ", ".join(f"`{arm}`" for arm in found.controls) or "none"
        lines.append(f"- Controls that pass the test themselves (of {', '.join(rule.controls)}): {passing}.")
    lines += ["", f"![{plot.title}]({name}.svg)", "", *_tables(found, config.evaluation.confidence)]
    return "\n".join(lines) + "\n"


def _sentence(family: str, verdict: Verdict, rule: RegisteredConfig, found: Analysis) -> str:
    pairs = ", ".join(f"`{arm}` against `{other}`" for arm, other in rule.families[family].items())
    if not verdict.passed:
        why = f", as a control does ({', '.join(found.controls)})" if found.controls else ""
        return f"{family} ({pairs}): **none** is clearly above its reference by both measures{why}."
    passed = ", ".join(f"`{arm}`" for arm in verdict.passed)
    leads = f"; the largest at equal change is `{verdict.leads}`" if len(verdict.passed) > 1 else ""
    return f"{family} ({pairs}): clearly above its reference by both measures: **{passed}**{leads}."


def _tables(found: Analysis, confidence: float) -> list[str]:
    lines: list[str] = []
    for measure, rows in found.tests.groupby("measure", sort=False):
        decides = measure in DECIDING
        head = [
            "arm",
            "reference",
            "role",
            "seeds",
            "arm's mean",
            "reference's",
            "difference",
            f"{confidence:.0%}",
            "p",
        ]
        lines += ["", f"## {str(measure).capitalize()}" + ("" if decides else " (told, decides nothing)"), ""]
        lines += [f"| {' | '.join([*head, 'Holm'] if decides else head)} |", "|" + "---|" * (len(head) + decides)]
        for row in rows.to_dict("records"):
            cells = [row["arm"], row["reference"], row["role"], str(row["seeds"])]
            cells += [f"{row[key]:.4f}" for key in ("mean", "reference_mean")]
            cells += [f"{row['difference']:+.4f}", f"{row['low']:+.4f} to {row['high']:+.4f}", f"{row['p']:.2g}"]
            if decides:
                cells.append("" if pd.isna(row["holm"]) else f"{row['holm']:.2g}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines[1:]
