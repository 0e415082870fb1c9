"""Every update of every run, and in one line each what stayed as it should."""

from vipo.reporting.sections.context import Page, Section


def training(page: Page) -> Section | None:
    """Curves of the metrics that moved; those that stayed where they are expected are told in words."""
    summary = page.summary
    if summary.training.empty:
        return None
    arms = [arm for arm in page.experiment.arms if arm != "base"]
    return Section(
        "training", "Training", {"arms": arms, "figures": page.drawn("training"), "flat": list(summary.flat.values())}
    )
