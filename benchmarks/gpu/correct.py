"""What the device computes against the CPU, and whether it computes the same twice."""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.prepared import prepared_config
from benchmarks.gpu.record import Record, others_go_on
from vipo.config.compose import load_config, repository_root
from vipo.generators.embeddings import stack_conditioning
from vipo.provenance.files import file_sha256
from vipo.sampling.chain import stochastic_steps
from vipo.sampling.noise import Key, keyed_normal
from vipo.sampling.rollout import Trajectory, rollout
from vipo.sampling.transitions import position_log_prob
from vipo.training.setup import Setup, set_up
from vipo.training.update import update

SMALL = (
    "experiment=demo",
    "arm=vipo",
    "sampling.steps=4",
    "training.updates=4",
    "training.prompts_per_update=2",
    "training.group_size=4",
    "training.micro_batch=4",
    "training.trained_transitions=2",
    "training.checkpoint_every=1",
    "training.save_at=[]",
    "evaluation.prompts=4",
    # One ratio that is not 1 would hide all other figures.
    "training.log_ratio_tolerance=1e9",
)
_OTHER_FAMILY = (
    "generator.height=32",
    "generator.width=48",
    "generator.guidance_scale=4",
    "generator.max_sequence_length=12",
    "prompts=file",
    "prompts.eval_share=0.4",
    "reward=redness",
    "perception.input_size=64",
    "evaluation.prompts=2",
    "evaluation.rewards=[redness]",
)
# Joined transitions are other batches than the rollout's: where kernels are not batch-invariant, their ratio is not 1.
_WINDOW = (
    "sampling.window={size: 2, move: fixed, solver: dpm2}",
    "training.joined_transitions=2",
)


def _family_overrides(family: str, folder: Path) -> list[str]:
    if family in ("demo", "demo_window"):
        return [] if family == "demo" else list(_WINDOW)
    sys.path.insert(0, str(repository_root() / "tests"))
    checkpoints = importlib.import_module("checkpoints")
    words = ("red", "blue", "tall", "old", "wet", "dry")
    (folder / "prompts.txt").write_text("".join(f"a {word} fox runs\n" for word in words))
    write = {"wan": checkpoints.write_wan, "sd": checkpoints.write_stable_diffusion}[family]
    overrides = [
        *_OTHER_FAMILY,
        f"generator.family={family}",
        f"generator.path={write(folder / family)}",
        f"prompts.source={folder / 'prompts.txt'}",
    ]
    return [*overrides, "generator.frames=9"] if family == "wan" else [*overrides, "sampling.transition=ddim"]


def prepare(results: Path, overrides: Sequence[str]) -> Path:
    """Prompts and embeddings of a small run; gives the folder of its experiment."""
    return results / prepared_config([*SMALL, *overrides], results).experiment.name


def prepared_setup(results: Path, overrides: Sequence[str]) -> Setup:
    """A small run, set up, with prompts and embeddings of its own."""
    return set_up(load_config([*SMALL, *overrides]), repository_root(), prepare(results, overrides))


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().cpu().double() - expected.detach().cpu().double()).abs().max())


@torch.no_grad()
def _computed(setup: Setup, given: Trajectory | None = None) -> dict[str, Tensor]:
    """A prediction, a chain, its pictures and its log-probabilities; of the chain `given` where there is one."""
    generator, chain = setup.generator, setup.chain
    ids = list(setup.embeddings)[:2]
    conditioning = stack_conditioning(setup.embeddings, ids)
    noise = keyed_normal([(0, "noise", i) for i in ids], generator.latent_shape, setup.device)
    initial: list[Key] = [(0, "initial", i) for i in ids]
    sampling = setup.config.sampling
    stochastic = stochastic_steps(sampling.window, len(chain.trainable), 0, 1)
    drawn: list[Key] = [(0, "step", i) for i in ids]
    path = rollout(generator, conditioning, chain, stochastic, initial, drawn, sampling.solver)
    seen = path if given is None else Trajectory(*(getattr(given, n).to(setup.device) for n in given.__dict__))
    steps = torch.tensor([0, 1], device=setup.device)
    latents, value, _ = seen.at(steps)
    mean, std = chain.gaussian(latents, generator.predict(latents, chain.times[steps], conditioning), steps)
    return {
        "prediction": generator.predict(noise, chain.times[1].expand(2), conditioning),
        "rollout": path.clean,
        "pictures": generator.pictures(path.clean),
        "log_prob": position_log_prob(value, mean, std),
        **{f"_{name}": value for name, value in path.__dict__.items()},
    }


# Relative to the root mean square of what the CPU has, of an update to that of the change of the weights: the first
# steps of AdamW go by the sign of gradients that may be next to nothing. At least seventy times what the CPU's own
# kernels are apart, with oneDNN and without; TF32 is beyond. The log ratio is as it is.
_TOLERANCES = {
    "prediction": 1e-3,
    "rollout": 1e-3,
    "pictures": 1e-3,
    "log_prob": 1e-3,
    "update": 0.02,
    "log_ratio": 1e-5,
}
_COMPUTED = ("prediction", "rollout", "pictures", "log_prob")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within the block, fp32 is fp32 on a GPU as on a CPU.

    PyTorch lets convolutions on a GPU round what they multiply to 10 bits (TF32) unless it is told otherwise.
    """
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def measure_agreement(
    record: Record, device: str, families: Sequence[str] = ("demo", "wan", "sd", "demo_window")
) -> None:
    """Differences to the CPU's of a prediction, a chain, pictures, log-probabilities and one update, without TF32.

    Args:
        families: whose generators; ``demo_window`` draws noise in two steps, solves the others by DPM-Solver++ 2M and
            joins both transitions in a call.

    Raises:
        RuntimeError: a family failed, or is beyond a tolerance; the others were measured.
    """
    record.put("tolerances", _TOLERANCES)
    failed: list[str] = []
    for family in families:
        with others_go_on(record, family, failed), tempfile.TemporaryDirectory() as name, without_tf32():
            apart = _measure_family(record, family, Path(name), device)
            # NaN is beyond, too.
            failed += [f"{family} ({key})" for key, value in apart.items() if not value <= _TOLERANCES[key]]
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _measure_family(record: Record, family: str, folder: Path, device: str) -> dict[str, float]:
    """Differences by what is compared, as in `_TOLERANCES`."""
    own = _family_overrides(family, folder)
    reference = prepared_setup(folder / "cpu", [*own, "generator.device=cpu"])
    found = prepared_setup(folder / "device", [*own, f"generator.device={device}"])
    expected = _computed(reference)
    path = Trajectory(*(expected[f"_{name}"] for name in Trajectory.__dataclass_fields__))
    apart = _apart(_computed(found, path), expected)
    if found.device.type == "cuda":
        # As a run has it: no limit, for how much it may be is the network's.
        torch.backends.cudnn.allow_tf32 = True
        record.put(f"{family}.tf32.relative_differences", _apart(_computed(found, path), expected))
        torch.backends.cudnn.allow_tf32 = False
    before = {name: value.detach().cpu().clone() for name, value in reference.trainable.items()}
    metrics = [update(setup, 1) for setup in (reference, found)]
    pairs = [(value, found.trainable[name], before[name]) for name, value in reference.trainable.items()]
    record.put(f"{family}.update.largest_weight_difference", max(_largest(other, own) for own, other, _ in pairs))
    moved = sum(_distance(own, first) ** 2 for own, _, first in pairs) ** 0.5
    apart["update"] = sum(_distance(own, other) ** 2 for own, other, _ in pairs) ** 0.5 / moved
    record.put(f"{family}.relative_differences", apart)
    shared = [key for key in metrics[0] if key.startswith(("reward/", "map/", "grad/", "loss"))]
    record.put(f"{family}.update.metric_differences", {key: abs(metrics[0][key] - metrics[1][key]) for key in shared})
    ratio = metrics[1]["log_ratio/max_before_first_step"]
    record.put(f"{family}.fp32.max_log_ratio", ratio)
    if reference.config.training.joined_transitions == 1:
        apart["log_ratio"] = ratio
    setup = prepared_setup(folder / "bf16", [*own, f"generator.device={device}", "generator.precision=bf16"])
    record.put(f"{family}.bf16.max_log_ratio", update(setup, 1)["log_ratio/max_before_first_step"])
    return apart


def _apart(computed: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest differences, relative to the root mean square of what is expected."""
    return {
        key: _largest(computed[key], expected[key]) / float(expected[key].double().square().mean().sqrt())
        for key in _COMPUTED
    }


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach().cpu().double() - other.detach().cpu().double()).norm())


# `vipo train` that kills itself in the rollout of update 3: who watches it may look away until it has ended.
_KILLED = """
import os, signal
from vipo.cli import main
from vipo.training import run
sound, batches = run.update, iter((False, True))
def kill(finished):
    if next(batches):
        os.kill(os.getpid(), signal.SIGKILL)
run.update = lambda setup, number, stop, show: sound(setup, number, kill if number == 3 else stop, show)
main()
"""


def measure_bytes(record: Record, device: str, runs: Sequence[str] = ("first", "second", "killed")) -> None:
    """The same run twice, and once more killed in the middle and started again: what differs of what it wrote.

    Args:
        runs: which of them; the others are compared with the first.

    Raises:
        RuntimeError: something differs, or a run failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, own = Path(name), [f"generator.device={device}"]
        for run in runs:
            prepare(folder / run, own)
        commands = {run: train_command(folder / run, own) for run in runs}
        killed = [sys.executable, "-c", _KILLED, *commands["killed"][3:]]
        started = {
            run: start(killed if run == "killed" else command, folder / f"{run}.log")
            for run, command in commands.items()
        }
        record.put("killed_while_running", started.pop("killed").wait() == -signal.SIGKILL)
        started["resumed"] = start(commands["killed"], folder / "resumed.log")
        wait_for(started, folder)
        record.put("resumed", "resumed after update" in (folder / "resumed.log").read_text())
        written = {run: _written(folder / run) for run in runs}
        record.put("files", len(written["first"]))
        apart = []
        for run in runs[1:]:
            differing = sorted(path for path in written["first"] | written[run] if _differs(path, written, run))
            record.put(f"differing_files.{'again' if run == 'second' else 'killed_and_resumed'}", differing)
            apart += differing
    if apart:
        raise RuntimeError(f"other bytes: {', '.join(sorted(set(apart)))}")


def _differs(path: str, written: dict[str, dict[str, str]], run: str) -> bool:
    return written["first"].get(path) != written[run].get(path)


def train_command(results: Path, overrides: Sequence[str]) -> list[str]:
    """`vipo train` of a small run."""
    return [sys.executable, "-m", "vipo.cli", "train", *SMALL, *overrides, "--results", str(results)]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A command whose output goes into `log`."""
    with log.open("wb") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=repository_root(), env=os.environ)


def wait_for(started: Mapping[str, subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until all have ended.

    Args:
        started: by a name, such as "first", whose log is ``folder/first.log``.

    Raises:
        RuntimeError: one ended badly.
    """
    for run, process in started.items():
        if process.wait():
            log = (folder / f"{run}.log").read_text(errors="replace")
            raise RuntimeError(f"{run} ended with status {process.returncode}:\n{log[-3000:]}")


def _written(folder: Path) -> dict[str, str]:
    kept = [*folder.rglob("*.safetensors"), *folder.rglob("metrics.jsonl"), *folder.rglob("state.json")]
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(kept)}
