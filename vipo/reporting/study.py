"""The study's tables and figures, from the results of its experiments: what `docs/study` holds."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from vipo.config.objective import SurrogateConfig
from vipo.config.run import Config
from vipo.config.values import config_hash
from vipo.errors import VipoError
from vipo.evaluation.left_out import told
from vipo.evaluation.matched import evaluation_curves
from vipo.evaluation.study import SELECTIVITY, clip_table, compare_over_seeds, decide
from vipo.provenance.files import atomic_folder
from vipo.reporting.drawing import INK, WIDTH, Arms, Plot, add_legend, as_plot, bare_rows, new_figure, new_row
from vipo.reporting.inputs import Experiment, read_experiment
from vipo.reporting.wording import label
from vipo.text import one_line

_DECISION, _PAGE = "decision.json", "README.md"
_MADE = (".csv", ".svg", _DECISION, _PAGE)
_MATCHINGS = {"updates": "equal updates", "reward": "equal reward", "change": "equal change"}


class StudyError(VipoError):
    """The study cannot be put together; the message names what is missing."""


def build_study(folders: Sequence[tuple[Path, Sequence[str], Config]], output: Path) -> Path:
    """Tables (CSV), figures (SVG), the decision (JSON) and one page (Markdown) of a study.

    Args:
        folders: ``results/<experiment>``, its runs and a configuration of it, for each experiment. The first one's
            section `study` fixes the decision; those whose arms differ in the gate alone make the clip study.
        output: folder that is replaced as a whole: a new one, an empty one, or an earlier study's.

    Returns:
        The page.

    Raises:
        StudyError: the first experiment has no section `study`, or `output` holds something else than a study.
        ReportError, ScoresError: results are missing or cannot be compared.
    """
    _check_replaceable(output)
    experiments = [read_experiment(folder, runs, config) for folder, runs, config in folders]
    config = experiments[0].config
    study = config.experiment.study
    if study is None:
        raise StudyError(
            f"experiment {config.experiment.name!r} has no section 'study': there is no decision to report"
        )
    confidence = config.evaluation.confidence
    decision = decide(experiments[0].scores, study, confidence)
    tables: dict[str, pd.DataFrame] = {}
    plots: list[Plot] = []
    references: dict[str, str] = {}
    for experiment in experiments:
        name = experiment.config.experiment.name
        tables[f"{name}-arms"] = _ends(experiment)
        # A study of the gate alone has no arm without a map; there the first trained arm is the reference.
        reference = study.reference if study.reference in experiment.arms else experiment.arms[1]
        references[name] = reference
        compared = compare_over_seeds(
            experiment.scores, reference, experiment.rewards[0], [*experiment.rewards, *experiment.changes], confidence
        )
        tables[f"{name}-compared"] = compared
        cells = _gate_cells(experiment)
        if len(cells):
            metrics = pd.concat(
                [run.metrics.assign(arm=run.config.arm) for run in experiment.runs if not run.metrics.empty]
            )
            tables[f"{name}-gates"] = clip_table(
                experiment.scores, metrics, cells, [experiment.rewards[0], "change/total"]
            )
            plots.append(_clip_plot(name, tables[f"{name}-gates"], experiment.rewards[0]))
        else:
            arms = Arms(experiment.arms)
            plots.append(_paths(name, experiment, arms))
            plots.append(_forest(name, compared, arms, reference, experiment.rewards[0]))
    with atomic_folder(output) as folder:
        for table_name, table in tables.items():
            table.to_csv(folder / f"{table_name}.csv", index=False, lineterminator="\n", float_format="%.6g")
        for plot in plots:
            (folder / f"{plot.name}.svg").write_text(plot.standalone(), encoding="utf-8")
        text = json.dumps({**study.model_dump(mode="json"), **decision.as_json()}, indent=1, allow_nan=False)
        (folder / _DECISION).write_text(text + "\n")
        (folder / _PAGE).write_text(_page(experiments, references, tables, plots, text), encoding="utf-8")
    return output / _PAGE


def _check_replaceable(output: Path) -> None:
    """Nothing but an earlier study makes way for one."""
    held = sorted(output.iterdir()) if output.is_dir() else [output] if output.exists() else []
    others = [path for path in held if not (path.is_file() and path.name.endswith(_MADE))]
    if held and (others or not (output / _DECISION).is_file()):
        named = f"{one_line(others[0].name, 80)!r}, which no study made" if others else "no earlier study"
        raise StudyError(
            f"{output}: holds {named}, and a study replaces its folder as a whole; choose another one with --output"
        )


def _ends(experiment: Experiment) -> pd.DataFrame:
    """Final means of every arm over its seeds, and their standard deviation."""
    columns = [*experiment.rewards, *experiment.changes]
    final = experiment.scores[experiment.scores["final"]]
    seeds = final.groupby(["arm", "seed"], sort=False)[columns].mean()
    means, spread = seeds.groupby("arm", sort=False).mean(), seeds.groupby("arm", sort=False).std()
    count = seeds.groupby("arm", sort=False).size().rename("seeds")
    return means.join(spread.add_suffix("_std")).join(count).reset_index()


def _gate_cells(experiment: Experiment) -> pd.DataFrame:
    """The arms of a clip study: all trained arms, where nothing but the gate tells them apart."""
    firsts = {arm: experiment.of_arm(arm)[0].config for arm in experiment.arms if arm != "base"}
    others = {config_hash(_without_gate(config)) for config in firsts.values()}
    cells = [
        {"arm": arm, "ratio": config.objective.ratio, **config.objective.gate.model_dump(mode="json")}
        for arm, config in firsts.items()
        if isinstance(config.objective, SurrogateConfig)
    ]
    if len(others) > 1 or len({config_hash(cell | {"arm": ""}) for cell in cells}) < 3:
        return pd.DataFrame()
    return pd.DataFrame(cells).rename(columns={"name": "gate"})


def _without_gate(config: Config) -> dict[str, Any]:
    identity = config.training_identity()
    del identity["arm"], identity["seed"]
    identity["objective"].pop("gate", None)
    return identity


def _paths(name: str, experiment: Experiment, arms: Arms) -> Plot:
    """Held-out reward over the size of change: arms' means over seeds."""
    reward = experiment.rewards[0]
    curves = evaluation_curves(experiment.scores, [reward, "change/total"])
    figure, axes = new_figure(3.2, width=1.5 * WIDTH)
    for arm, curve in curves.groupby("arm", sort=False):
        axes.plot(
            curve["change/total"], curve[reward], color=arms.color(str(arm)), marker=arms.marker(str(arm)),
            markersize=3.6, linewidth=1.4,
        )  # fmt: skip
    axes.set_xlabel("mean absolute pixel change against the base")
    axes.set_ylabel(f"held-out {label(reward)}")
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.6)
    add_legend(figure, arms.handles(curves["arm"]))
    title = f"{label(reward)} over change"
    return as_plot(figure, f"{name}-paths", "study", title, "means over seeds and held-out prompts", title)


def _forest(name: str, compared: pd.DataFrame, arms: Arms, reference: str, reward: str) -> Plot:
    """Differences to the reference in the three matchings: reward, and where the change falls."""
    shown = [("updates", reward), ("change", reward), ("reward", "change/total"), ("reward", SELECTIVITY)]
    order = [arm for arm in arms.names if arm in set(compared["arm"])]
    figure, panels = new_row(len(shown), 1.1 + 0.26 * len(order), 3 * WIDTH)
    for axes, (matched, column) in zip(panels, shown, strict=True):
        rows = compared[(compared["matched"] == matched) & (compared["column"] == column)].set_index("arm")
        for place, arm in enumerate(order):
            if arm not in rows.index:
                continue
            row = rows.loc[arm]
            color = arms.color(arm)
            axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2.0, solid_capstyle="round")
            axes.plot(row["difference"], place, marker=arms.marker(arm), color=color, markersize=4.6)
        # The scale is that of the arms with the most seeds; a wider interval of few seeds runs off the plot.
        if rows.empty:
            axes.text(0.5, 0.5, "no common level\nwas reached", transform=axes.transAxes, ha="center", va="center")
        else:
            most = rows[rows["seeds"] == rows["seeds"].max()]
            reach = 2 * float(most[["low", "high"]].abs().to_numpy().max())
            axes.set_xlim(-reach, reach)
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.55, dashes=(3, 2))
        axes.set_xlabel(f"{_words(column)}\nat {_MATCHINGS[matched]}")
        bare_rows(axes)
    panels[0].set_yticks(range(len(order)), order)
    panels[0].set_ylim(len(order) - 0.4, -0.6)
    title = f"Differences to {reference}"
    return as_plot(figure, f"{name}-differences", "study", title, "intervals over seeds", title)


def _clip_plot(name: str, gates: pd.DataFrame, reward: str) -> Plot:
    """Final reward over the clipped share, one line a scope and gate."""
    gated = gates[(gates["ratio"] == "position") & (gates["gate"] != "none")]
    gated = gated.assign(kind=gated["scope"] + ", " + gated["gate"])
    kinds = list(gated["kind"].unique())
    arms = Arms(["", *kinds])
    figure, axes = new_figure(3.0, width=1.5 * WIDTH)
    for kind in kinds:
        own = gated[gated["kind"] == kind].sort_values("clipped")
        axes.errorbar(
            own["clipped"],
            own[reward],
            yerr=own[f"{reward}_std"] / own["seeds"].map(math.sqrt),
            color=arms.color(kind),
            marker=arms.marker(kind),
            markersize=4,
            linewidth=1.3,
            elinewidth=0.8,
        )
    handles = arms.handles(kinds)
    for row in gates[gates["gate"] == "none"].to_dict("records"):
        axes.axhline(row[reward], color=INK, linewidth=0.8, alpha=0.6, dashes=(3, 2))
        handles.append(Line2D([], [], color=INK, linewidth=0.8, dashes=(3, 2), label="no clip"))
    axes.set_xlabel("clipped share of positions, mean over updates")
    axes.set_ylabel(f"held-out {label(reward)} after the last update")
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.6)
    add_legend(figure, handles)
    title = "Reward over clipped share"
    return as_plot(figure, f"{name}-gates", "study", title, "bars: standard error over seeds", title)


def _words(column: str) -> str:
    return "selectivity of the change" if column == SELECTIVITY else label(column)


def _page(
    experiments: Sequence[Experiment],
    references: dict[str, str],
    tables: dict[str, pd.DataFrame],
    plots: Sequence[Plot],
    decision: str,
) -> str:
    commits = sorted(
        {
            str((run.provenance or {}).get("git", {}).get("commit"))
            for item in experiments
            for run in item.runs
            if run.provenance
        }
    )
    lines = [
        "# The study's results",
        "",
        "Made by `make study` (`vipo study`); nothing here is written by hand. What it means is told in "
        "[method.md](../method.md). Every file beside this page is a table or a figure of it.",
        "",
        f"Trained at commit {', '.join(commits)}.",
        "",
        *(
            text
            for item in experiments
            for column in item.rewards
            if (note := told(item.scores, column))
            for text in (f"`{item.config.experiment.name}`, `{column}`: {note}.", "")
        ),
        "## The decision",
        "",
        "```json",
        decision,
        "```",
    ]
    for experiment in experiments:
        name, config = experiment.config.experiment.name, experiment.config
        lines += ["", f"## {one_line(config.experiment.title)}", "", one_line(config.experiment.question), ""]
        lines += [f"![{plot.title}]({plot.name}.svg)" for plot in plots if plot.name.startswith(f"{name}-")]
        lines += ["", *_markdown(_ends_shown(tables[f"{name}-arms"]))]
        if f"{name}-gates" in tables:
            lines += ["", *_markdown(tables[f"{name}-gates"])]
        compared = tables[f"{name}-compared"]
        kept = compared[
            compared["column"].isin([experiment.rewards[0], "change/total", SELECTIVITY, "reward/scene_shape"])
        ]
        lines += [
            "",
            f"Differences to {references[name]}, paired by seed, {config.evaluation.confidence:.0%} intervals:",
            "",
        ]
        lines += _markdown(kept)
    return "\n".join(lines) + "\n"


def _ends_shown(table: pd.DataFrame) -> pd.DataFrame:
    return table[
        [
            "arm",
            "seeds",
            *(name for name in table.columns if name.startswith(("reward/", "change/")) and not name.endswith("_std")),
        ]
    ]


def _markdown(table: pd.DataFrame) -> list[str]:
    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    head = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return head + ["| " + " | ".join(cell(value) for value in row) + " |" for row in table.itertuples(index=False)]
