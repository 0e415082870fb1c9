"""What was run: the facts that all runs share, and the arms."""

from vipo.reporting.sections.context import Page, Section


def run(page: Page) -> Section:
    """The experiment's facts and its arms."""
    return Section("run", "What was run", {"facts": page.summary.facts, "arms": page.summary.arms.to_dict("records")})
