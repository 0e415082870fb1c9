"""A tiny generator of the demo's own class and layout, and the configuration that runs on it."""

import functools
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait for each other do not spin: tests run side by side, some with more threads than there are cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What starts a container tells a run of it; the tests tell it themselves.
os.environ.pop("VIPO_GIT_COMMIT", None)
os.environ.pop("VIPO_IMAGE_DIGEST", None)
os.environ.pop("VIPO_IMAGE_FILE", None)
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.environ.get("TMPDIR", "/tmp") + "/hypothesis")

# A script's shell starts what it puts in the background with SIGINT ignored, and with it all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
from filelock import FileLock
from nursery import Nurseries, nurseries
from tiny import TINY_PRETRAIN

# How long an example takes, or drawing some, depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


# One worker runs a module, whose fixtures are made once; and here modules, or tests of them, that share what is dear.
WORKER_GROUPS = {
    "tests/e2e/test_apptainer.py": "workflow",
    "tests/e2e/test_dvc.py": "workflow",
    "tests/e2e/test_tutorial.py": "workflow",
    "tests/e2e/test_workflow.py": "workflow",
    "tests/integration/test_audit.py": "audit",
    "tests/integration/test_copied_results.py": "audit",
    "tests/integration/test_crate.py::test_it_passes_the_required_checks": "audit",
    "tests/integration/test_docs_commands.py": "audit",
    "tests/integration/test_git.py::test_a_replaced_lock_anchors_nothing": "audit",
    "tests/integration/test_tampering.py": "audit",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Groups of tests by name: xdist's own are marks, which it passes on by a name that pytest 9.2 does not read."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            named = (group for start, group in WORKER_GROUPS.items() if nodeid.startswith(start))
            return next(named, None) or super()._split_scope(nodeid)

    # In the order of the folders: what takes minutes begins first, and the end is many small modules.
    config.option.loadscopereorder = False
    return Grouped(config, log)


@pytest.fixture(autouse=True)
def garbage() -> Iterator[None]:
    """What lives is not looked through again: of a heap of a million objects, a collection takes a second."""
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count at the end what was left over find nothing."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What libraries leave in the environment ends with the test: trackers' switches, PyTorch's folders.

    Fixtures of a module or a session are set up before this one, and what they set stays for as long as they do; for
    them, and for what a test sets itself, the nurseries have a list of variables that a fork may differ in (`FREE`).
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def installed() -> Iterator[None]:
    """What is installed stays as it is: it is read once, which is an eighth of a small stage, not for every record."""
    from vipo.provenance import lineage

    with pytest.MonkeyPatch.context() as patch:
        for name in ("installed_sha256", "versions"):
            patch.setattr(lineage, name, functools.cache(getattr(lineage, name)))
        yield


@pytest.fixture(scope="session")
def forks() -> Iterator[Nurseries]:
    """Commands as forks of processes that have imported everything; what starts one pays nothing for it."""
    with nurseries() as begun:
        yield begun


@pytest.fixture(scope="session")
def tiny_generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A diffusers folder made by `vipo base`'s own code at a tiny budget, once for all workers.

    Raises:
        AssertionError: at the end, a test wrote into it. Other workers have its files mapped: one that is cut short,
            be it for a moment, ends them with SIGBUS.
    """
    from vipo.config.pretrain import PretrainConfig
    from vipo.training.pretrain import train_base

    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "tiny-generator"
    with FileLock(shared / "tiny-generator.lock"):
        if not (folder / "model_index.json").is_file():
            train_base(PretrainConfig(**TINY_PRETRAIN), folder, shared / "tiny-work")
    made = _written(folder)
    yield folder
    assert _written(folder) == made, f"a test wrote into {folder}, which all workers share; copy it first"


def _written(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: ((told := path.stat()).st_ino, told.st_mtime_ns) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def prepared(tiny_generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with prompts and embeddings of the tiny generator; tests that train copy it."""
    from vipo.config.compose import load_config, repository_root
    from vipo.stages import encode_stage, prepare_stage

    results = tmp_path_factory.mktemp("prepared")
    config = load_config(["experiment=demo", f"generator.path={tiny_generator}"])
    prepare_stage(config, repository_root(), results)
    encode_stage(config, repository_root(), results)
    return results


@pytest.fixture
def tiny_overrides(tiny_generator: Path) -> list[str]:
    """Hydra overrides: the demo experiment on the tiny generator, seconds a run."""
    return [
        "experiment=demo",
        f"generator.path={tiny_generator}",
        "sampling.steps=4",
        "training.updates=4",
        "training.prompts_per_update=2",
        "training.group_size=4",
        "training.micro_batch=4",
        "training.trained_transitions=2",
        "training.checkpoint_every=1",
        "training.save_at=[2]",
        "evaluation.prompts=4",
        "evaluation.steps=4",
        "evaluation.bootstrap=200",
        "evaluation.shown_prompts=2",
    ]


@pytest.fixture(scope="session")
def measured_parts() -> list[str]:
    """Overrides: a measurement of credit, shares of samples and scores, a reward of another process, a protocol."""
    served = f"{{name: process, label: served, options: {{reward: redness, environment: {sys.executable}}}}}"
    # Of trained weights: some tests' reward stands still at a call of training, which must not be another stage's.
    meter = "arms: [grpo], checkpoints: [grpo-s0], updates: 1, reference: 0, stepped: 1, directions: [sgd]"
    return [
        f"evaluation.rewards=[object_redness, {served}]",
        "cluster.shares=2",
        f"experiment.meter={{{meter}, held_out: 1, held_out_samples: 1}}",
        "++protocol={name: tiny, version: 1, pins: {evaluation: {prompts: 4}}}",
    ]


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.1 checkpoint."""
    from checkpoints import write_wan

    return write_wan(tmp_path_factory.mktemp("tiny-wan") / "wan")


@pytest.fixture(scope="session")
def tiny_stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion 1.x checkpoint."""
    from checkpoints import write_stable_diffusion

    return write_stable_diffusion(tmp_path_factory.mktemp("tiny-sd") / "sd")
