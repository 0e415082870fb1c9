"""Settings in which runs differ, and every run's whole configuration."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from vipo.config.compose import dump_config
from vipo.provenance.files import text_lines
from vipo.reporting.inputs import Run
from vipo.reporting.sections.context import Page, Section


def configuration(page: Page) -> Section:
    """What differs between trained runs, and the resolved configurations with their differing lines marked."""
    runs = page.experiment.runs
    return Section(
        "configuration", "Configuration", {"differing": _differing(runs), "configurations": _configurations(runs)}
    )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {key: text for name, part in value.items() for key, text in _flat(part, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): json.dumps(value, ensure_ascii=False)}


def _differing(runs: Sequence[Run]) -> dict[str, Any]:
    """Settings that are not the same in all trained runs; the arm's name and seed are known already."""
    trained = [run for run in runs if not run.config.is_base]
    flat = {
        run.name: _flat(run.config.model_dump(mode="json", exclude={"experiment", "arm", "seed"})) for run in trained
    }
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = [
        {"key": key, "values": [values.get(key, "—") for values in flat.values()]}
        for key in keys
        if len({values.get(key) for values in flat.values()}) > 1
    ]
    return {"runs": [{"name": run.name, "arm": run.config.arm} for run in trained], "rows": rows}


def _configurations(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's YAML by lines, marked where it is not the first run's."""
    texts = [text_lines(dump_config(run.config)) for run in runs]
    reference = texts[0]
    result = []
    for run, lines in zip(runs, texts, strict=True):
        matcher = difflib.SequenceMatcher(a=reference, b=lines, autojunk=False)
        marked = [
            {"text": line, "differs": kind != "equal"}
            for kind, _, _, start, end in matcher.get_opcodes()
            for line in lines[start:end]
        ]
        result.append({"run": run.name, "arm": run.config.arm, "lines": marked})
    return result
