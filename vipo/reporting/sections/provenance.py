"""What must hold for the comparison to mean something, and the records of the training runs."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vipo.config.objective import SurrogateConfig
from vipo.reporting.inputs import Experiment, Run
from vipo.reporting.sections.context import Page, Section


def provenance(page: Page) -> Section:
    """Checks, each with whether it holds, and which code, machine and files made the runs."""
    experiment = page.experiment
    return Section(
        "provenance",
        "Checks and provenance",
        {
            "checks": _checks(experiment, page.live),
            # A run that still trains has no record yet.
            "records": [
                _provenance(run)
                for run in experiment.runs
                if not run.config.is_base and not (page.live and run.provenance is None)
            ],
            "manifest": json.dumps(experiment.manifest, indent=2, sort_keys=True, ensure_ascii=False),
        },
    )


_NOISE = "log_ratio/rms_before_first_step"


def _checks(experiment: Experiment, live: bool) -> list[dict[str, Any]]:
    """What must hold for the comparison to mean something, and whether the records say that it did.

    Args:
        live: whether runs may still train; what they have only at their end is not missed then.
    """
    trained = [run for run in experiment.runs if not run.config.is_base]
    checks = []
    key = "log_ratio/max_before_first_step"
    # An objective without a ratio has nothing to compare.
    compared = [run for run in trained if key in run.metrics or isinstance(run.config.objective, SurrogateConfig)]
    if compared:
        largest = max((float(run.metrics[key].max()) for run in compared if key in run.metrics), default=math.nan)
        noise = max((float(run.metrics[_NOISE].max()) for run in compared if _NOISE in run.metrics), default=math.nan)
        tolerance = min(run.config.training.log_ratio_tolerance for run in compared)
        checks.append(
            {
                "ok": largest <= tolerance,
                "text": f"Rollout and update are the same policy: max |log ρ| before the first step is {largest:.1e} "
                f"(tolerance {tolerance:.0e}), its root mean square {noise:.1e}.",
            }
        )
    if not live:
        short = [run for run in trained if run.updates != run.config.training.updates]
        checks.append(
            {
                "ok": not short,
                "text": "Every run made all of its updates."
                if not short
                else "Fewer updates than configured: " + ", ".join(f"{run.name} {run.updates}" for run in short) + ".",
            }
        )
    constant = [
        float(run.metrics["map/constant_share"].mean()) for run in trained if "map/constant_share" in run.metrics
    ]
    if constant:
        checks.append(
            {
                "ok": max(constant) < 0.05,
                "text": "Maps without structure (they fall back to plain GRPO): at most "
                f"{100 * max(constant):.1f} % of a run's samples.",
            }
        )
    mapped = [run.config.perception for run in trained if run.config.credit.reads_backbone]
    from vipo.perception.backbones import NOT_MEASURED, registered_evidence

    evidence = {told for config in mapped if (told := registered_evidence(config)) is not None}
    if evidence:
        checks.append(
            {
                "ok": NOT_MEASURED not in evidence,
                "text": "That the rule of orientation puts the maps on the object rather than on its background: "
                f"{'; '.join(sorted(evidence))}.",
            }
        )
    records = [run.provenance for run in trained if run.provenance is not None]
    absent = [] if live else [run.name for run in trained if run.provenance is None]
    if live and not records:
        return checks
    if absent:
        checks.append(
            {
                "ok": False,
                "text": f"Records of the training are not here for {', '.join(absent)}: which code and machine made "
                "these runs is not recorded here.",
            }
        )
        return checks
    made_by = [made for record in records for made in record.get("updates_made_by", [])]
    packages = {record.get("package_sha256") for record in (*records, *made_by)}
    states = [record.get(key) or {} for record in records for key in ("git", "checkout")]
    dirty = any(state.get("dirty") for state in (*states, *made_by))
    checks.append(
        {
            "ok": len(packages) == 1,
            "text": "All runs were trained by the same vipo package."
            if len(packages) == 1
            else f"Runs were trained by {len(packages)} different versions of the vipo package.",
        }
    )
    checks.append(
        {
            "ok": not dirty,
            "text": "The working tree had uncommitted changes."
            if dirty
            else "No run was trained from a working tree with uncommitted changes.",
        }
    )
    return checks


def _provenance(run: Run) -> dict[str, Any]:
    record = run.provenance or {}
    hardware = record.get("hardware") or {}
    facts = {
        "Command": _plain(record.get("command")),
        "Started": _plain(record.get("started")),
        "Ended": _plain(record.get("ended")),
        "Commit": _commit(record.get("git") or {}),
        **({"Commit of the configuration": _commit(record["checkout"])} if "checkout" in record else {}),
        "Package SHA-256": _plain(record.get("package_sha256")),
        **({"Updates made by": _packages(record["updates_made_by"])} if "updates_made_by" in record else {}),
        "Lock SHA-256": _plain(record.get("lock_sha256")),
        "Installed SHA-256": _plain(record.get("installed_sha256")),
        "Container digest": _plain(record.get("container_digest")),
        "Hardware": ", ".join(f"{key} {_plain(value)}" for key, value in hardware.items()) or "not recorded",
        "Versions": ", ".join(f"{key} {_plain(value)}" for key, value in (record.get("versions") or {}).items())
        or "not recorded",
    }
    files = [
        {"role": role, "path": str(entry["path"]), "bytes": entry["bytes"], "sha256": str(entry["sha256"])}
        for role in ("inputs", "outputs")
        for entry in record.get(role, [])
    ]
    return {"run": run.name, "arm": run.config.arm, "facts": facts, "files": files}


def _commit(git: Mapping[str, Any]) -> str:
    return _plain(git.get("commit")) + (" with uncommitted changes" if git.get("dirty") else "")


def _packages(made_by: Sequence[Mapping[str, Any]]) -> str:
    return ", then ".join(f"{_plain(made['package_sha256'])} (commit {_commit(made)})" for made in made_by)


def _plain(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)
