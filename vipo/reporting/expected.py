"""Training metrics that stay where they should: told in one line each instead of drawn."""

from collections.abc import Mapping

import pandas as pd

from vipo.reporting.inputs import Experiment

#: What each metric should be, and what is said of it.
_EXPECTED = {
    "group/zero_std_share": (0.0, "every group of samples carried a signal (no group with equal rewards)"),
    "log_ratio/max_before_first_step": (0.0, "rollout and update were the same policy"),
}


def flat_metrics(training: pd.DataFrame, experiment: Experiment, titles: Mapping[str, str]) -> dict[str, str]:
    """Of metrics that are flat as expected, or the same number throughout, a sentence each.

    Args:
        training: tidy rows with `metric` and `value`.
        titles: of metrics of which nothing is expected.
    """
    trained = [run.config for run in experiment.runs if not run.config.is_base]
    tolerance = min(config.training.log_ratio_tolerance for config in trained)
    found = {}
    for metric, rows in training.groupby("metric", sort=False):
        values = rows["value"]
        low, high = float(values.min()), float(values.max())
        allowed = tolerance if str(metric).startswith("log_ratio/max") else 0.0
        expected, told = _EXPECTED.get(str(metric), (None, ""))
        if expected is not None and abs(low - expected) <= allowed and abs(high - expected) <= allowed:
            measured = "" if low == high == expected else f": at most {high:.1e} in any update, tolerance {allowed:.0e}"
            found[str(metric)] = f"As expected, {told}{measured}."
        elif low == high:
            found[str(metric)] = f"{titles[str(metric)]}: {low:.3g} in every update of every run."
    return found
