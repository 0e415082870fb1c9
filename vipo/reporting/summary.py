"""Every number of the report. Pure functions of the experiment's records."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd

from vipo.evaluation.left_out import left_out
from vipo.evaluation.matched import evaluation_curves, matched_reward
from vipo.evaluation.statistics import Better, compare_arms
from vipo.reporting.expected import flat_metrics
from vipo.reporting.inputs import Experiment
from vipo.reporting.tables import arm_table, caveats, clip_by_step, facts, seed_means, training_table
from vipo.reporting.verdict import EqualChange, equal_change
from vipo.reporting.wording import Statement, statements, words

#: Training metrics that are drawn over updates, with their captions.
METRICS = {
    "reward/mean": ("Training reward", "mean reward of the update's samples"),
    "grad/norm": ("Gradient norm", "before clipping, mean over optimizer steps"),
    "clip/share": ("Clipped share", "share of terms outside the trust region"),
    "log_ratio/max_before_first_step": (
        "Rollout against update",
        "largest |log ratio| before the first step; 0 is exact",
    ),
    "log_ratio/rms_sample": (
        "Change of the policy, per sample",
        "root mean square of a sample's log ratio after a step",
    ),
    "log_ratio/rms_position": (
        "Change of the policy, per position",
        "the same per position: what its clip range is for",
    ),
    "kl": ("Divergence from the generator as it was", "KL, mean over positions, of the trained transitions"),
    "distance/reference": (
        "Distance to the generator as it was",
        "mean squared difference of the velocities, on the forward process",
    ),
    "distance/old": ("Distance to the old policy", "the same, to the slow policy that samples"),
    "distance/anchor": ("Distance to the anchor", "the same, to the average that anchors"),
    "map/mean": ("Map mean", "mean of the allocation map"),
    "map/entropy": ("Map entropy", "entropy of the allocation map over positions; 1 is uniform"),
    "group/std": ("Group standard deviation", "of the reward within a prompt's samples"),
    "group/zero_std_share": ("Groups without signal", "share of groups whose rewards are all equal"),
}
_TITLES = {metric: title for metric, (title, _) in METRICS.items()}


@dataclass(frozen=True)
class Summary:
    """The report's numbers. Tables are tidy; `columns` maps each score column to its label."""

    name: str
    facts: dict[str, str]
    columns: dict[str, str]
    trained: dict[str, Better]
    arms: pd.DataFrame
    seed_means: pd.DataFrame
    comparisons: pd.DataFrame
    curves: pd.DataFrame
    seed_curves: pd.DataFrame
    matched: pd.DataFrame
    training: pd.DataFrame
    clip_by_step: pd.DataFrame
    flat: dict[str, str]
    equal_change: tuple[EqualChange, ...]
    headline: tuple[Statement, ...]
    against_base: tuple[Statement, ...]
    layout: tuple[Statement, ...]
    side_effects: tuple[Statement, ...]
    caveats: tuple[str, ...]
    confidence: float

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables that are written as CSV, by file name."""
        names = "arms seed_means comparisons curves seed_curves matched training clip_by_step"
        return {name: getattr(self, name) for name in names.split()}

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; missing numbers are null."""
        statements = {
            name: [asdict(item) for item in getattr(self, name)]
            for name in ("headline", "against_base", "layout", "side_effects")
        }
        return {
            "experiment": self.name,
            "facts": self.facts,
            "labels": self.columns,
            "trained": self.trained,
            "confidence": self.confidence,
            "flat": self.flat,
            "equal_change": [{**asdict(item), "word": item.word} for item in self.equal_change],
            "statements": statements,
            "caveats": list(self.caveats),
            "tables": {
                name: json.loads(table.to_json(orient="records", double_precision=15))
                for name, table in self.tables().items()
            },
        }

    def final(self, column: str, reference: str) -> dict[str, Statement]:
        """Final comparisons of every arm with `reference` on `column`, by arm."""
        table = self.comparisons
        chosen = table["final"] & (table["column"] == column) & (table["reference"] == reference)
        return {item.arm: item for item in statements(table[chosen], self.trained)}


def summarize(experiment: Experiment) -> Summary:
    """Compute the report's numbers."""
    config, scores = experiment.config, experiment.scores
    columns = [*experiment.rewards, *experiment.changes]
    trained: dict[str, Better] = {
        f"reward/{term.label}": "higher" if term.weight > 0 else "lower"
        for term in config.reward.terms
        if term.weight != 0
    }
    trained_arms = {arm: experiment.of_arm(arm)[0].config.credit for arm in experiment.arms if arm != "base"}
    controls = [arm for arm, credit in trained_arms.items() if credit.sources and credit.is_control]
    focus = [arm for arm, credit in trained_arms.items() if credit.sources and not credit.is_control]
    references = [arm for arm in dict.fromkeys(["base", "grpo", *controls]) if arm in experiment.arms]
    comparisons = compare_arms(
        scores,
        columns,
        references=references,
        resamples=config.evaluation.bootstrap,
        confidence=config.evaluation.confidence,
        seed=config.evaluation.seed,
    )
    final = comparisons[comparisons["final"]]

    def compare(arms: Sequence[str], others: Sequence[str], names: Sequence[str]) -> tuple[Statement, ...]:
        chosen = final["arm"].isin(arms) & final["reference"].isin(others) & final["column"].isin(names)
        return statements(final[chosen], trained)

    against_base = compare(list(trained_arms), ["base"], list(trained))
    headline = compare(focus, ["grpo"], list(trained)) or against_base
    side = [name for name in experiment.rewards if name not in trained]
    matched = [
        matched_reward(scores, on, [name for name in columns if name != on], better=better)
        for on, better in [*trained.items(), ("change/total", "higher")]
    ]
    training = training_table(experiment, list(METRICS))
    return Summary(
        name=config.experiment.name,
        facts=facts(experiment),
        columns={name: _titled(name, scores) for name in columns},
        trained=trained,
        arms=arm_table(experiment, columns),
        seed_means=seed_means(scores, columns),
        comparisons=comparisons,
        curves=evaluation_curves(scores, columns),
        seed_curves=evaluation_curves(scores, columns, per_seed=True),
        matched=pd.concat([table.reindex(columns=_MATCHED + columns) for table in matched], ignore_index=True),
        training=training,
        clip_by_step=clip_by_step(experiment),
        flat=flat_metrics(training, experiment, _TITLES),
        equal_change=_equal_change(experiment, focus, trained, side),
        headline=headline,
        against_base=against_base,
        layout=compare(focus, controls, list(trained)),
        side_effects=compare(list(trained_arms), ["base"], side),
        caveats=caveats(experiment, final, config),
        confidence=config.evaluation.confidence,
    )


def _titled(column: str, scores: pd.DataFrame) -> str:
    """What a metric is called wherever it is told, with how many samples it is not over."""
    count = left_out(scores, column)
    return words(column) + (f" ({count} sample{'s' if count > 1 else ''} left out)" if count else "")


def _equal_change(
    experiment: Experiment, arms: Sequence[str], trained: Mapping[str, Better], side: Sequence[str]
) -> tuple[EqualChange, ...]:
    """Every arm with credit of its own against GRPO, on every trained reward."""
    settings = experiment.config.evaluation
    found = (
        equal_change(
            experiment.scores, arm, "grpo", column, side, better=better,
            resamples=settings.bootstrap, confidence=settings.confidence, seed=settings.seed,
        )
        for column, better in trained.items()
        for arm in arms
        if "grpo" in experiment.arms and arm != "grpo"
    )  # fmt: skip
    return tuple(item for item in found if item is not None)


def summarize_training(experiment: Experiment, evaluated: Summary | None = None) -> Summary:
    """What can be said while runs train: all curves, beside the numbers of what is evaluated already."""
    training = training_table(experiment, list(METRICS))
    told: dict[str, Any] = {
        "training": training,
        "clip_by_step": clip_by_step(experiment),
        "flat": flat_metrics(training, experiment, _TITLES),
    }
    if evaluated is not None:
        return replace(evaluated, **told)
    empty = compare_arms(experiment.scores, [])
    return Summary(
        name=experiment.config.experiment.name,
        facts=facts(experiment),
        columns={},
        trained={},
        arms=arm_table(experiment, []),
        seed_means=pd.DataFrame(),
        comparisons=empty,
        curves=pd.DataFrame(),
        seed_curves=pd.DataFrame(),
        matched=pd.DataFrame(),
        **told,
        equal_change=(),
        headline=(),
        against_base=(),
        layout=(),
        side_effects=(),
        caveats=(),
        confidence=experiment.config.evaluation.confidence,
    )


_MATCHED = ["arm", "seed", "on", "level", "reached", "update"]
