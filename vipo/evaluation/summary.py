"""A run's evaluation in one row. Imports no torch."""

from typing import Any

import pandas as pd

from vipo.evaluation.left_out import left_out


def summarize(scores: pd.DataFrame) -> dict[str, Any]:
    """The final weights' update, number of samples and mean of every measured column.

    `left_out`, where there is one, says of how many samples a column has no score; a column without any is null.
    """
    final = scores[scores["final"]]
    columns = [name for name in scores.columns if name.startswith(("reward/", "change/"))]
    means = {name: None if final[name].isna().all() else float(final[name].mean()) for name in columns}
    missing = {name: count for name in columns if (count := left_out(final, name))}
    told = {"left_out": missing} if missing else {}
    named = {"protocol": str(final["protocol"].iloc[0])} if "protocol" in final else {}
    return {**named, "update": int(final["update"].iloc[0]), "samples": len(final), **means, **told}
