"""Where everything is, the command that makes each again, and how to cite."""

from vipo.reporting.sections.context import Page, Section

CITATION = (
    "@misc{vipo,\n"
    "  title = {Seeing What Matters: Visual Preference Policy Optimization for Visual Generation},\n"
    "  author = {Ni and others},\n"
    "  year = {2025},\n"
    "  eprint = {2511.18719},\n"
    "  archivePrefix = {arXiv}\n"
    "}"
)


def files(page: Page) -> Section:
    """Links relative to the page, as the results lie on disk, and commands from the repository's root."""
    name = page.experiment.config.experiment.name
    compose = f"experiment={name}"
    # The page of runs that train stands before the report's own files.
    shared = (
        []
        if page.live
        else [
            ("data/report.json", "every number on this page but times and records", f"vipo summarize {compose}"),
            ("data/tables/", "every table, as CSV", f"vipo summarize {compose}"),
            ("data/figures/", "every figure, as SVG", f"vipo summarize {compose}"),
            ("../comparison/", "categories, wins, all rewards at once, totals, diversity", f"vipo compare {compose}"),
            ("index.html", "this page", f"vipo report {compose}"),
        ]
    )
    shared.append((f"{page.root}prompts/manifest.json", "where the prompts come from", f"vipo prepare {compose}"))
    there = set(page.experiment.scores["run"])
    runs = []
    for run in page.experiment.runs:
        selected = f"{compose} arm={run.config.arm} seed={run.config.seed}"
        runs.append(
            {
                "name": run.name,
                "arm": run.config.arm,
                "trained": None if run.config.is_base else f"{page.root}runs/{run.name}/",
                "train": None if run.config.is_base else f"vipo train {selected}",
                "evaluated": f"{page.root}evaluation/{run.name}/" if run.name in there else None,
                "evaluate": f"vipo evaluate {selected}",
            }
        )
    whole = f"snakemake --profile local --config experiment={name}"
    return Section("files", "Files", {"shared": shared, "runs": runs, "whole": whole, "citation": CITATION})
