"""The `compare` stage: an experiment's scores as tables: categories, wins, all metrics at once, totals, diversity."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vipo.config.run import Config
from vipo.evaluation.comparison import by_category, over_metrics, win_rates
from vipo.evaluation.held_out import EvaluationError, held_out_batches, samples_folder
from vipo.evaluation.left_out import on_common_samples
from vipo.evaluation.means import ScoresError
from vipo.evaluation.titles import other_title, titles
from vipo.evaluation.totals import set_totals
from vipo.prompts import categories_of, read_prompts
from vipo.provenance.files import atomic_file
from vipo.provenance.records import PROCESSES, PROVENANCE, differing_processes, read_provenance, whole_record
from vipo.provenance.reward_files import differing_files, reward_inputs

TABLES = ("categories", "win_rates", "metrics", "totals", "diversity")


def compare_runs(config: Config, experiment: Path, runs: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The tables by name. Every row names the protocol, where the evaluation is one.

    Args:
        config: of any run; of its section `evaluation`, bootstrap, confidence and seed.
        experiment: ``results/<experiment>``.
        runs: names of scored runs, the base's among them.

    Raises:
        EvaluationError: a run is not scored, its samples are not there, or another process, other weights or another
            protocol scored it than the others.
        ScoresError: runs were not evaluated on the same prompts and samples.
    """
    _check_one_measure(experiment, runs)
    path = experiment / "prompts" / "eval.jsonl"
    metadata = {prompt.id: prompt.metadata for prompt in read_prompts(path)}
    categories = {id_: categories_of(row) for id_, row in metadata.items()}
    tables = {run: _scores(experiment, run) for run in runs}
    first, measured = next(iter(tables)), {run: _measured(table) for run, table in tables.items()}
    title = config.protocol_title or titles(tables[first])[0]
    for run, table in tables.items():
        if fault := other_title(table, title):
            raise EvaluationError(f"{experiment / 'evaluation' / run}: {fault}")
        if differing := set(measured[run]) ^ set(measured[first]):
            raise EvaluationError(
                f"{experiment / 'evaluation' / run}: {', '.join(sorted(differing))} is measured of it or of {first}, "
                "not of both; evaluate both again with the same evaluation.rewards"
            )
    scores, lost = on_common_samples(pd.concat(tables.values(), ignore_index=True))
    columns = _measured(scores)
    rewards = [name for name in columns if name.startswith("reward/")]
    settings = config.evaluation
    found = {
        "categories": by_category(scores, categories, columns),
        "win_rates": win_rates(scores, rewards),
        "metrics": over_metrics(
            scores, rewards, resamples=settings.bootstrap, confidence=settings.confidence, seed=settings.seed
        ),
        "totals": set_totals(scores, metadata, _geneval_columns(config)),
        "diversity": _diversity(config, experiment, runs, scores, path),
    }
    metrics = found["metrics"]
    for column in lost:
        note = "not measured: fewer than 2 prompts have a score in every run"
        metrics.loc[len(metrics), ["column", "note"]] = [column, note]
    if config.protocol is not None:
        for table in found.values():
            table.insert(0, "protocol", config.protocol_title)
    return found


def _measured(scores: pd.DataFrame) -> list[str]:
    return [name for name in scores.columns if name.startswith(("reward/", "change/"))]


def _geneval_columns(config: Config) -> list[str]:
    """Of the reward `geneval`, whatever its label, here or in a reward process."""
    specs = config.evaluation.rewards
    return [f"reward/{spec.label}" for spec in specs if "geneval" in (spec.name, spec.options.get("reward"))]


def write_tables(tables: dict[str, pd.DataFrame], output: Path) -> list[Path]:
    """Write each as ``<name>.csv``; the same bytes for the same results."""
    written = []
    for name, table in tables.items():
        with atomic_file(output / f"{name}.csv") as path:
            table.to_csv(path, index=False, lineterminator="\n")
        written.append(output / f"{name}.csv")
    return written


def _check_one_measure(experiment: Path, runs: Sequence[str]) -> None:
    paths = {run: experiment / "evaluation" / run / PROVENANCE for run in runs}
    records = {run: read_provenance(path) for run, path in paths.items() if path.is_file()}
    for label, run, other in differing_processes({run: record.get(PROCESSES, {}) for run, record in records.items()}):
        raise EvaluationError(
            f"reward {label!r}: another process scored {run} than {other} ({paths[run]} and that run's tell which "
            "packages and weights), so they cannot be compared; evaluate both by one: vipo evaluate does it again "
            "where the process is another one"
        )
    read = {}
    for run, record in records.items():
        with whole_record(paths[run]):
            read[run] = reward_inputs(record)
    for path, run, other in differing_files(read):
        raise EvaluationError(
            f"{path}: rewards of {run} were read from it, and those of {other} from none of these bytes, so they "
            "cannot be compared; evaluate both by the same files: vipo evaluate does it again where they are others"
        )


def _scores(experiment: Path, run: str) -> pd.DataFrame:
    path = experiment / "evaluation" / run / "scores.parquet"
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}); evaluate {run} first") from error


def _diversity(config: Config, experiment: Path, runs: Sequence[str], scores: pd.DataFrame, path: Path) -> pd.DataFrame:
    # Torch reads pictures; the other tables do without.
    from vipo.evaluation.diversity import diversity

    samples = [sample for batch in held_out_batches(path, config) for sample in batch]
    rows = []
    for run in runs:
        own = scores[(scores["run"] == run) & scores["final"]]
        if own.empty:
            raise ScoresError(f"{run}: has no final scores")
        update, folder = int(own["update"].iloc[0]), samples_folder(experiment, run) / "pictures"
        found = diversity(folder, update, samples, video=config.generator.frames is not None)
        value = sum(found.values()) / len(found) if found else None
        note = "" if found else "not measured: one sample a prompt"
        rows.append({"run": run, "arm": own["arm"].iloc[0], "prompts": len(found), "diversity": value, "note": note})
    return pd.DataFrame(rows, columns=["run", "arm", "prompts", "diversity", "note"])
