"""The report's tables and facts, as they follow from the experiment's records. Pure functions of these."""

from collections.abc import Iterable, Sequence

import pandas as pd

from vipo.config.generator import GeneratorConfig
from vipo.config.run import Config
from vipo.evaluation.left_out import told
from vipo.evaluation.means import mean_score
from vipo.evaluation.statistics import MINIMUM_SEEDS
from vipo.reporting.inputs import Experiment
from vipo.reporting.wording import describe, words

_TIME_PARTS = ("rollout", "learn", "decode", "reward", "map", "other")


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


def _evaluated(config: Config) -> str:
    """Where an evaluation's samples are made otherwise than those of training."""
    trained, own = config.generator, config.evaluated
    told = [f"at {_size(own)}"] if own.sample_shape != trained.sample_shape else []
    if own.guidance_scale != trained.guidance_scale:
        told.append(f"with guidance {own.guidance_scale:g}")
    return f", evaluated {' '.join(told)}" if told else ""


def _size(generator: GeneratorConfig) -> str:
    frames = "" if generator.frames is None else f", {generator.frames} frames"
    return f"{generator.width} × {generator.height} pixels{frames}"


def facts(experiment: Experiment) -> dict[str, str]:
    """The experiment in a few lines, by name: generator, reward, arms, prompts."""
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
        "Generator": f"{config.generator.family}, {_size(config.generator)}{_evaluated(config)}",
        "Checkpoint": config.generator.path,
        **({} if config.protocol_title is None else {"Protocol": config.protocol_title}),
        "Trained reward": rewards,
        "Arms × seeds": ", ".join(f"{arm} × {len(experiment.of_arm(arm))}" for arm in experiment.arms),
        "Updates": f"{updates}, each {samples}",
        "Sampling chain": steps,
        "Fine-tuning": _shared(
            "all weights" if item.training.lora is None else f"LoRA, rank {item.training.lora.rank}" for item in trained
        ),
        "Prompts": f"{experiment.prompt_counts['train']} for training, {experiment.prompt_counts['eval']} held out",
        "Evaluation": "not yet"
        if base.empty
        else (
            f"{base['prompt_id'].nunique()} held-out prompts × {base['sample'].nunique()} samples, same noise for "
            f"every arm, {config.evaluation.steps} ODE steps"
        ),
    }


def _shared(values: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else f"{' or '.join(distinct)} (by arm, see the configuration)"


def arm_table(experiment: Experiment, columns: Sequence[str]) -> pd.DataFrame:
    """One row an arm: its seeds, what it trains, its final means."""
    rows = []
    for arm in experiment.arms:
        runs = experiment.of_arm(arm)
        final = experiment.scores[(experiment.scores["arm"] == arm) & experiment.scores["final"]]
        rows.append(
            {
                "arm": arm,
                "seeds": " ".join(str(run.config.seed) for run in runs),
                "seed_count": len(runs),
                "update": max(run.updates for run in runs) if final.empty else int(final["update"].max()),
                "objective": "untrained" if arm == "base" else describe(runs[0].config),
                **{name: mean_score(final, name) for name in columns},
            }
        )
    return pd.DataFrame(rows)


def seed_means(scores: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means of every arm, seed and update."""
    rows = [
        {"arm": arm, "seed": seed, "update": update, "final": final}
        | {name: mean_score(part, name) for name in columns}
        for (arm, seed, update, final), part in scores.groupby(["arm", "seed", "update", "final"], sort=False)
    ]
    return pd.DataFrame(rows)


def training_table(experiment: Experiment, metrics: Sequence[str]) -> pd.DataFrame:
    """Training metrics of all runs, tidy: a row for each run, update and metric."""
    parts = [
        run.metrics.reindex(columns=["update", *metrics]).assign(run=run.name, arm=run.config.arm, seed=run.config.seed)
        for run in experiment.runs
        if not run.metrics.empty
    ]
    table = pd.concat(parts, ignore_index=True)[["run", "arm", "seed", "update", *metrics]]
    return table.melt(["run", "arm", "seed", "update"], var_name="metric", value_name="value").dropna(
        subset="value", ignore_index=True
    )


def clip_by_step(experiment: Experiment) -> pd.DataFrame:
    """Mean clipped share by sampling step over all updates: `run`, `arm`, `seed`, `step`, `share`."""
    rows = []
    for run in experiment.runs:
        found = [str(name) for name in run.metrics.columns if str(name).startswith("clip/share_t")]
        for column in sorted(found, key=lambda name: int(name.removeprefix("clip/share_t"))):
            step = int(column.removeprefix("clip/share_t"))
            identity = {"run": run.name, "arm": run.config.arm, "seed": run.config.seed, "step": step}
            rows.append({**identity, "share": float(run.metrics[column].mean())})
    return pd.DataFrame(rows, columns=["run", "arm", "seed", "step", "share"])


def caveats(experiment: Experiment, final: pd.DataFrame, config: Config) -> tuple[str, ...]:
    """What a reader must know of these intervals."""
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
    by_chance = len(final) * (1 - config.evaluation.confidence)
    result.append(
        f"{len(final)} final comparisons were computed and none is adjusted for that number: if no arm differed from "
        f"another at all, {f'about {by_chance:.0f}' if by_chance >= 1 else 'fewer than one'} would still exclude zero."
    )
    invalid = sum(
        float(run.metrics["samples/invalid"].sum()) for run in experiment.runs if "samples/invalid" in run.metrics
    )
    if invalid:
        result.append(f"{invalid:.0f} training samples had a reward that was not finite and were left out.")
    for column in experiment.rewards:
        if text := told(experiment.scores, column):
            result.append(
                f"{words(column).capitalize()}: {text}, in every run, where one run has no score or several have none."
            )
    result += [
        f"{words(column).capitalize()} is not told: fewer than two prompts have a score in every run."
        for column in experiment.lost
    ]
    return tuple(result)
