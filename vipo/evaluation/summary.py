"""A run's evaluation in one row. Imports no torch."""

from typing import Any

import pandas as pd


def summarize(scores: pd.DataFrame) -> dict[str, Any]:
    """The final weights' update, number of samples and mean of every measured column."""
    final = scores[scores["final"]]
    columns = [name for name in scores.columns if name.startswith(("reward/", "change/"))]
    means = {name: float(final[name].mean()) for name in columns}
    named = {"protocol": str(final["protocol"].iloc[0])} if "protocol" in final else {}
    return {**named, "update": int(final["update"].iloc[0]), "samples": len(final), **means}
