"""The words that the report's numbers earn: of a comparison, of a score, of an arm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from vipo.config.credit import CreditConfig
from vipo.config.objective import NoGateConfig, ObjectiveConfig, PpoGateConfig, RatioGateConfig, SurrogateConfig
from vipo.config.run import Config
from vipo.evaluation.statistics import Better, Interval, decimals, wording

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
    """The name of a score column: ``reward/object_redness`` is "object_redness", ``change/total`` "change"."""
    kind, name = column.split("/", 1)
    if kind == "reward":
        return name
    return "change" if name == "total" else f"{name} change"


def words(column: str) -> str:
    """`label` for a sentence: "object redness"."""
    return label(column).replace("_", " ")


def number(value: float, digits: int = 3) -> str:
    """A number with so many decimal places, with a minus sign in place of a hyphen."""
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int) -> str:
    """`number` with its sign, whichever it is."""
    return f"{value:+.{digits}f}".replace("-", "−")


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
        told = f"{gate.name} gate"
        if isinstance(gate, RatioGateConfig):
            above = gate.range_above if isinstance(gate, PpoGateConfig) else None
            told += f" {gate.range:g}{'' if above is None else f' to {above:g}'} per {gate.scope}"
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
