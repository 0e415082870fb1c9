"""Has anything become dearer? Ratios measured in one run, and counts, against reviewed ones in `baseline.json`.

    python -m benchmarks.compare            # all; about two minutes of a processor, status 1 beyond a margin
    python -m benchmarks.compare --counts   # what is counted alone: the same on every machine
    python -m benchmarks.compare --write    # take what is found as the baseline, for a review

Times are seconds of the processor, of work that is divided by other work of the same run: by the update's own network
calls, or by an import of torch in a fresh process. A machine that is busy, or another one, moves both.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.finished import finished_experiment, with_prompts
from benchmarks.gpu.waits import HostReads
from benchmarks.operations import operations_beside_networks
from benchmarks.update_share import command_seconds, loaded, measure, watched
from vipo.audit import audit_experiment
from vipo.config.compose import dump_config, load_config, repository_root
from vipo.config.run import Config
from vipo.reporting import build_data, build_report
from vipo.runtime import settle_runtime
from vipo.training.update import update

BASELINE = Path(__file__).with_name("baseline.json")
#: A run of seconds, for what is counted, audited and reported.
SMALL = (
    "experiment=demo",
    "arm=vipo",
    "seed=0",
    *(f"~experiment.arms.{arm}" for arm in ("grpo", "product", "inverted")),
    "experiment.arms.vipo.seeds=[0]",
    "sampling.steps=4",
    "training.updates=2",
    "training.group_size=4",
    "training.micro_batch=4",
    "training.trained_transitions=2",
    "training.save_at=[]",
    "evaluation.prompts=4",
    "evaluation.samples_per_prompt=1",
    "evaluation.steps=4",
    "evaluation.bootstrap=200",
)
PROMPTS = 2000
_REPEATS = 3


def count_update(overrides: Sequence[str]) -> dict[str, float]:
    """What one update of a small run asks for; no clock is read.

    Args:
        overrides: of a run, such as `SMALL`.

    Returns:
        ``update.<part>``: calls of network, decoder, backbone and rewards; backward passes; values that the host reads
        of tensors; operators called beside the networks; bytes that it reads of files and does not map.
    """
    with loaded(load_config(list(overrides))) as setup:
        update(setup, 1)
        with watched(setup) as calls:
            before = _bytes_read()
            update(setup, 2)
            read = _bytes_read() - before
        with HostReads() as waits:
            update(setup, 3)
        beside = operations_beside_networks(setup, 4)
    found = {f"update.{name}": float(number) for name, number in sorted(calls.counts.items())}
    found["update.operations_beside_networks"] = float(beside["all"])
    found["update.values_read_by_the_host"] = float(sum(waits.lines.values()))
    found["update.bytes_read"] = float(read)
    return found


def count_audit(overrides: Sequence[str], folder: Path) -> dict[str, float]:
    """How often an audit reads each byte of an experiment's results, all that it reads taken together.

    Args:
        overrides: of a run.
        folder: a results folder, in which the experiment is made.
    """
    experiment = finished_experiment(load_config(list(overrides)), folder)
    audit_experiment(experiment, repository_root())
    before = _bytes_read()
    audited = audit_experiment(experiment, repository_root())
    return {"audit.reads": round((_bytes_read() - before) / audited.checked.bytes, 1)}


def ratios(config: Config, folder: Path) -> Iterator[tuple[str, float]]:
    """Processor time over other processor time, by name.

    Args:
        config: of the finished run below `folder`.
        folder: a results folder with the experiment that `count_audit` made.
    """
    with loaded(load_config(["experiment=demo", "arm=vipo"])) as setup:
        shares = measure(setup, 5)
    yield from ((name, shares[name]) for name in ("update_over_floor", "map_share"))
    resolved = folder / "run.yaml"
    resolved.write_text(dump_config(config), encoding="utf-8")
    finished = ["--config", str(resolved), "--results", str(folder)]
    starts = {
        "help": ["--help"],
        "config": ["config", "experiment=demo"],
        "train_of_a_finished_run": ["train", *finished],
        "sample_of_a_finished_run": ["evaluate", "--only", "sample", *finished],
        "score_of_a_finished_run": ["evaluate", "--only", "score", *finished],
    }
    commands = {name: [sys.executable, "-m", "vipo.cli", *words] for name, words in starts.items()}
    commands["torch"] = [sys.executable, "-c", "import torch"]
    # One after the other, several times: what slows the machine down for a while slows all of them.
    rounds = [{name: command_seconds(command) for name, command in commands.items()} for _ in range(_REPEATS)]
    torch = min(each["torch"] for each in rounds)
    yield from ((f"start.{name}", min(each[name] for each in rounds) / torch) for name in starts)
    experiment = folder / config.experiment.name
    yield "audit", _seconds(lambda: audit_experiment(experiment, repository_root())) / torch
    large, runs = with_prompts(experiment, PROMPTS, folder / "large"), ("base-s0", config.run_name)
    report = large / "report"
    yield "data_of_2000_prompts", _seconds(lambda: build_data(large, runs, config, report / "data")) / torch
    yield "page_of_2000_prompts", _seconds(lambda: build_report(large, runs, config, report)) / torch


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def judged(found: dict[str, float], baseline: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """What is found beyond its margin, or is not in the baseline: name, value, reviewed value, largest one allowed.

    Margins are the baseline's `margins`, by a figure's name or its first part; without one it may not be dearer at all.
    """
    dearer = []
    for name, value in found.items():
        reviewed = float(baseline["figures"].get(name, -1))
        margins = baseline["margins"]
        most = reviewed * (1 + float(margins.get(name, margins.get(name.partition(".")[0], 0))))
        # Rounding of the file.
        if value > most + 1e-3:
            dearer.append((name, value, reviewed, most))
    return dearer


def main() -> None:
    """Print every figure beside the reviewed one; status 1 where one is dearer than its margin allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="what is counted alone")
    parser.add_argument("--write", action="store_true", help="take what is found as the baseline")
    arguments = parser.parse_args()
    settle_runtime()
    baseline = json.loads(BASELINE.read_text(encoding="utf-8"))
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counted = (count_update(SMALL) | count_audit(SMALL, folder)).items()
        measured = () if arguments.counts else ratios(load_config(list(SMALL)), folder)
        # As it comes: whatever ends the run, what was found stands there.
        for name, value in itertools.chain(counted, measured):
            found[name] = value
            mark = "  DEARER" if judged({name: value}, baseline) else ""
            print(f"{name:40} {value:10.3f}  reviewed {baseline['figures'].get(name)}{mark}", flush=True)
    if arguments.write:
        figures = baseline["figures"] | {name: round(value, 3) for name, value in found.items()}
        BASELINE.write_text(json.dumps(baseline | {"figures": figures}, indent=1) + "\n", encoding="utf-8")
    sys.exit(int(bool(judged(found, baseline)) and not arguments.write))


if __name__ == "__main__":
    main()
