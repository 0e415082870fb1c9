"""What credit is worth: the measurements that the experiment asks for."""

from vipo.reporting.sections.context import Page, Section


def credit(page: Page) -> Section | None:
    """Each measured checkpoint: figure, estimators, transitions, costs; None where the experiment measures nothing."""
    experiment = page.experiment
    meter = experiment.config.experiment.meter
    if meter is None:
        return None
    # What was measured needs torch, the page does not.
    from vipo.reporting.measured import credit_section

    found = credit_section(experiment.folder, meter)
    return None if found is None else Section("credit", "What credit is worth", {"credit": found})
