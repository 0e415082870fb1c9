"""Every number of the report, and the words that they earn. Pure functions of the experiment's records."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd

from vipo.config.credit import CreditConfig
from vipo.config.objective import NoGateConfig, ObjectiveConfig, RatioGateConfig, SurrogateConfig
from vipo.config.run import Config
from vipo.evaluation.matched import evaluation_curves, matched_reward
from vipo.evaluation.statistics import MINIMUM_SEEDS, Better, Interval, compare_arms, decimals, mean_score, wording
from vipo.reporting.inputs import Experiment

#: Training metrics that are drawn over updates, with their captions.
METRICS = {
    "reward/mean": ("Training reward", "mean reward of the update's samples"),
    "grad/norm": ("Gradient norm", "before clipping, mean over optimizer steps"),
    "clip/share": ("Clipped share", "share of terms outside the trust region"),
    "log_ratio/max_before_first_step": ("max |log ρ| before the first step", "rollout against update; 0 is exact"),
    "log_ratio/rms_sample": ("Change of the policy, per sample", "root mean square of a sample's log ρ after a step"),
    "log_ratio/rms_position": (
        "Change of the policy, per position",
        "the same per position: what its clip range is for",
    ),
    "kl": ("KL to the generator as it was", "mean over positions, of the trained transitions"),
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

_TIME_PARTS = ("rollout", "learn", "decode", "reward", "map", "other")

Tone = Literal["none", "better", "worse", "shift"]


@dataclass(frozen=True)
class Statement:
    """One comparison in words: `arm` against `reference` on `column`."""

    arm: str
    reference: str
    column: str
    verdict: str
    tone: Tone
    estimate: float
    low: float
    high: float
    note: str

    @property
    def word(self) -> str:
        """The verdict without its size: "better", "no difference shown"."""
        return self.verdict.partition(" by ")[0]

    @property
    def digits(self) -> int:
        """Decimal places for the estimate and its limits."""
        return decimals(self.estimate, self.low, self.high)


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


def statements(comparisons: pd.DataFrame, trained: Mapping[str, Better]) -> tuple[Statement, ...]:
    """Rows of `compare_arms` in words; only trained rewards are called better or worse."""
    result = []
    for row in comparisons.to_dict("records"):
        interval = Interval(row["difference"], row["low"], row["high"], row["unit"], row["note"])
        better = trained.get(row["column"])
        result.append(
            Statement(
                arm=row["arm"],
                reference=row["reference"],
                column=row["column"],
                verdict=wording(interval, better),
                tone=_tone(interval, better),
                estimate=interval.estimate,
                low=interval.low,
                high=interval.high,
                note=interval.note,
            )
        )
    return tuple(result)


def _tone(interval: Interval, better: Better | None) -> Tone:
    if interval.includes_zero:
        return "none"
    if better is None:
        return "shift"
    return "better" if (interval.estimate > 0) == (better == "higher") else "worse"


def label(column: str) -> str:
    """The words for a score column: ``reward/object_redness`` is "object_redness", ``change/total`` "change"."""
    kind, name = column.split("/", 1)
    if kind == "reward":
        return name
    return "change" if name == "total" else f"{name} change"


def describe(config: Config) -> str:
    """What an arm trains, in a few words."""
    ratio, gate = _described(config.objective)
    by_step = "" if config.credit.steps == "none" else f" and transition ({config.credit.steps})"
    if not config.credit.sources:
        return f"{ratio} and one advantage per sample{by_step}{gate}"
    given = f"{config.credit.multiplies}{by_step.replace(' and', ' per')}"
    return f"{ratio}, {given} weighted by {_weights(config.credit)}{gate}"


def _described(objective: ObjectiveConfig) -> tuple[str, str]:
    if not isinstance(objective, SurrogateConfig):
        return f"objective {objective.name}", ""
    gate = objective.gate
    if isinstance(gate, NoGateConfig):
        told = "no gate"
    else:
        told = f"{gate.name} gate" + (f" {gate.range:g} per {gate.scope}" if isinstance(gate, RatioGateConfig) else "")
    return ("one ratio" if objective.ratio == "sample" else "ratio per position"), f"; {told}"


def _weights(credit: CreditConfig) -> str:
    known = {
        "backbone": "the allocation map",
        "uniform": "ones",
        "oracle": "the object's own pixels",
        "contrast": "the contrast to siblings",
        "reward": "where the reward looks",
        "attention": "the attention to the prompt's words",
    }
    product = (" times " if credit.mixture is None else " and ").join(known.get(name, name) for name in credit.names)
    bare = product.removeprefix("the ")
    return {
        "none": product,
        "inverted": f"the inverted {bare}",
        "shuffled": f"the shuffled {bare}",
        "mean": f"the mean of the sample's own {bare}",
        "group": f"the group's mean {bare}",
    }[credit.control]


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
    return Summary(
        name=config.experiment.name,
        facts=_facts(experiment),
        columns={name: label(name) for name in columns},
        trained=trained,
        arms=_arm_table(experiment, columns),
        seed_means=_seed_means(scores, columns),
        comparisons=comparisons,
        curves=evaluation_curves(scores, columns),
        seed_curves=evaluation_curves(scores, columns, per_seed=True),
        matched=pd.concat([table.reindex(columns=_MATCHED + columns) for table in matched], ignore_index=True),
        training=_training(experiment, list(METRICS)),
        clip_by_step=_clip_by_step(experiment),
        headline=headline,
        against_base=against_base,
        layout=compare(focus, controls, list(trained)),
        side_effects=compare(list(trained_arms), ["base"], side),
        caveats=_caveats(experiment, final, config),
        confidence=config.evaluation.confidence,
    )


def summarize_time(experiment: Experiment) -> pd.DataFrame:
    """Mean seconds of an update by part, one row a run: `run`, `arm`, `updates`, parts, `total`, `peak_bytes`.

    These come from volatile records and stay outside every equality claim.
    """
    rows = []
    for run in experiment.runs:
        if run.timing.empty:
            continue
        means = run.timing.filter(like="time/").fillna(0.0).mean()
        parts = {str(name).removeprefix("time/"): float(value) for name, value in means.items()}
        names = [*_TIME_PARTS, *(name for name in parts if name not in (*_TIME_PARTS, "total"))]
        row = {"run": run.name, "arm": run.config.arm, "updates": len(run.timing)}
        row |= {name: parts.get(name, 0.0) for name in names} | {"total": parts["total"]}
        rows.append({**row, "peak_bytes": float(run.timing["memory/peak_bytes"].max())})
    return pd.DataFrame(rows)


_MATCHED = ["arm", "seed", "on", "level", "reached", "update"]


def _facts(experiment: Experiment) -> dict[str, str]:
    config = experiment.config
    trained = [run.config for run in experiment.runs if not run.config.is_base]
    terms = config.reward.terms
    rewards = ", ".join(term.title if len(terms) == 1 else f"{term.weight:g} × {term.title}" for term in terms)
    updates = _shared(f"{item.training.updates}" for item in trained)
    samples = _shared(
        f"{item.training.prompts_per_update} prompts × {item.training.group_size} samples" for item in trained
    )
    steps = _shared(
        f"{item.sampling.steps} steps, {item.training.trained_transitions} trained, η {item.sampling.eta:g}"
        for item in trained
    )
    base = experiment.scores[experiment.scores["arm"] == "base"]
    return {
        "Generator": f"{config.generator.family}, {config.generator.width} × {config.generator.height} pixels",
        "Checkpoint": config.generator.path,
        "Trained reward": rewards,
        "Arms × seeds": ", ".join(f"{arm} × {len(experiment.of_arm(arm))}" for arm in experiment.arms),
        "Updates": f"{updates}, each {samples}",
        "Sampling chain": steps,
        "Fine-tuning": _shared(
            "all weights" if item.training.lora is None else f"LoRA, rank {item.training.lora.rank}" for item in trained
        ),
        "Prompts": f"{experiment.prompt_counts['train']} for training, {experiment.prompt_counts['eval']} held out",
        "Evaluation": (
            f"{base['prompt_id'].nunique()} held-out prompts × {base['sample'].nunique()} samples, same noise for "
            f"every arm, {config.evaluation.steps} ODE steps"
        ),
    }


def _shared(values: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else f"{' or '.join(distinct)} (by arm, see the configuration)"


def _arm_table(experiment: Experiment, columns: Sequence[str]) -> pd.DataFrame:
    rows = []
    for arm in experiment.arms:
        runs = experiment.of_arm(arm)
        final = experiment.scores[(experiment.scores["arm"] == arm) & experiment.scores["final"]]
        rows.append(
            {
                "arm": arm,
                "seeds": " ".join(str(run.config.seed) for run in runs),
                "seed_count": len(runs),
                "update": int(final["update"].max()),
                "objective": "untrained" if arm == "base" else describe(runs[0].config),
                **{name: mean_score(final, name) for name in columns},
            }
        )
    return pd.DataFrame(rows)


def _seed_means(scores: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    rows = [
        {"arm": arm, "seed": seed, "update": update, "final": final}
        | {name: mean_score(part, name) for name in columns}
        for (arm, seed, update, final), part in scores.groupby(["arm", "seed", "update", "final"], sort=False)
    ]
    return pd.DataFrame(rows)


def _training(experiment: Experiment, metrics: Sequence[str]) -> pd.DataFrame:
    parts = [
        run.metrics.reindex(columns=["update", *metrics]).assign(run=run.name, arm=run.config.arm, seed=run.config.seed)
        for run in experiment.runs
        if not run.metrics.empty
    ]
    table = pd.concat(parts, ignore_index=True)[["run", "arm", "seed", "update", *metrics]]
    return table.melt(["run", "arm", "seed", "update"], var_name="metric", value_name="value").dropna(
        subset="value", ignore_index=True
    )


def _clip_by_step(experiment: Experiment) -> pd.DataFrame:
    """Mean clipped share by sampling step over all updates: `run`, `arm`, `seed`, `step`, `share`."""
    rows = []
    for run in experiment.runs:
        found = [str(name) for name in run.metrics.columns if str(name).startswith("clip/share_t")]
        for column in sorted(found, key=lambda name: int(name.removeprefix("clip/share_t"))):
            step = int(column.removeprefix("clip/share_t"))
            identity = {"run": run.name, "arm": run.config.arm, "seed": run.config.seed, "step": step}
            rows.append({**identity, "share": float(run.metrics[column].mean())})
    return pd.DataFrame(rows, columns=["run", "arm", "seed", "step", "share"])


def _caveats(experiment: Experiment, final: pd.DataFrame, config: Config) -> tuple[str, ...]:
    counts = {arm: len(experiment.of_arm(arm)) for arm in experiment.arms if arm != "base"}
    few = {arm: count for arm, count in counts.items() if count < MINIMUM_SEEDS}
    prompts = experiment.scores["prompt_id"].nunique()
    percent = f"{100 * config.evaluation.confidence:g} %"
    result = []
    if few:
        listed = ", ".join(f"{arm} {count}" for arm, count in few.items())
        result.append(
            f"The {percent} intervals of arms with fewer than {MINIMUM_SEEDS} seeds ({listed}) resample the {prompts} "
            "held-out prompts only: they are conditional on these seeds and say nothing about a new one."
        )
    if len(few) < len(counts):
        result.append(f"Intervals between arms with at least {MINIMUM_SEEDS} seeds resample seeds and prompts.")
    result.append(
        f"{len(final)} final comparisons were computed and none is adjusted for that number: if no arm differed from "
        f"another at all, about {len(final) * (1 - config.evaluation.confidence):.0f} would still exclude zero."
    )
    invalid = sum(
        float(run.metrics["samples/invalid"].sum()) for run in experiment.runs if "samples/invalid" in run.metrics
    )
    if invalid:
        result.append(f"{invalid:.0f} training samples had a reward that was not finite and were left out.")
    return tuple(result)
