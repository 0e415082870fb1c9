"""The protocol that scores were measured under, as each of their rows names it."""

import pandas as pd


def other_title(scores: pd.DataFrame, title: str | None) -> str | None:
    """Why scores cannot stand under a protocol's title; None: they were measured under it.

    Args:
        scores: of a run.
        title: None: that of no protocol.
    """
    found = titles(scores)
    if found == [title]:
        return None
    own, wanted = ((" and ".join(each or "no protocol" for each in names)) for names in (found, [title]))
    return f"was evaluated by {own}, not by {wanted}; evaluate it again, or name the other protocol"


def titles(scores: pd.DataFrame) -> list[str | None]:
    """The titles of the protocols that scores were measured under."""
    return [*sorted(map(str, scores["protocol"].unique()))] if "protocol" in scores else [None]
