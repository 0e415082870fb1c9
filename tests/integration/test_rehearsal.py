"""Without a GPU, the script for one is rehearsed: what torch's CUDA front end does to vipo, and that it can fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

from benchmarks.gpu.rehearsal.build import ROOT, build
from vipo.config.compose import repository_root

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, which the rehearsal needs")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Once, where `make rehearse` has it too; git sees nothing of it."""
    assert repository_root() == ROOT
    build(ROOT / ".rehearsal")
    seen = subprocess.run(["git", "status", "--porcelain", ".rehearsal"], cwd=ROOT, capture_output=True, text=True)
    assert (seen.returncode, seen.stdout) == (0, "")


def rehearsed(code: str, *arguments: str | Path, **variables: str) -> str:
    """What a Python program prints on a machine that pretends to have GPUs."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("REHEARSAL_")}
    env = given | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [ROOT / "benchmarks/gpu/rehearsal/rehearse.sh", sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["key"]: line["value"] for line in lines}


_FAULTS = """
import importlib.util, sys
assert "torch" not in sys.modules
# As libraries ask whether it is there.
assert importlib.util.find_spec("torch") is not None
import torch
def fails(call):
    try:
        return str(call())
    except RuntimeError as error:
        return str(error)
there, here = torch.ones(3, device="cuda"), torch.ones(3)
own = torch.Generator("cuda")
drawn = [torch.randn(3, device="cuda", generator=own.manual_seed(seed)).tolist() for seed in (1, 1, 2)]
state = own.get_state()
again = [torch.randn(3, device="cuda", generator=own.set_state(state)).tolist() for _ in range(2)]
later = torch.randn(3, device="cuda", generator=own).tolist()
print(torch.cuda.device_count(), torch.cuda.get_device_name())
print((there * 2).sum().item(), (there * 2).device)
# More than the allocator has in hand from before.
print(torch.empty(2**20, device="cuda").isnan().all().item())
print(drawn[0] == drawn[1] != drawn[2], again[0] == again[1] != later)
print(fails(lambda: there + here))
print(fails(lambda: here[there.long() - 1]))
print(fails(lambda: there.clone().index_put_((here.long() - 1,), here)))
print(there[here.long() - 1].tolist())
print(fails(lambda: there + there.to("cuda:1")))
print(fails(lambda: torch.randn(3, device="cuda", generator=torch.Generator())))
print(fails(lambda: torch.empty(2**40, device="cuda")))
torch.use_deterministic_algorithms(True)
print(fails(lambda: there.cumsum(0)))
small = torch.ones(1, 1, 2, 2, device="cuda", requires_grad=True)
enlarged = torch.nn.functional.interpolate(small, size=3, mode="bicubic", antialias=True)
print(fails(lambda: enlarged.sum().backward()))
torch.cuda.set_sync_debug_mode("error")
print(fails(lambda: there[there > 0]))
print(fails(lambda: there.cpu()))
print(there.sum().device)
"""


def test_it_fails_where_a_gpu_does() -> None:
    found = rehearsed(_FAULTS, REHEARSAL_GPUS="2").splitlines()
    assert found[:4] == ["2 Rehearsal", "6.0 cuda:0", "True", "True True"]
    mixed, indexed, put, taken, two_devices, generator, memory, summed, resized, *waited, sound = found[4:]
    for told in (mixed, indexed, put):
        assert told.startswith("Expected all tensors to be on the same device")
    # Indices alone may be the CPU's.
    assert taken == "[1.0, 1.0, 1.0]"
    assert two_devices.endswith("of tensors on cuda:0 and cuda:1")
    assert generator == "Expected a 'cuda' device type for generator but found 'cpu'"
    assert memory.startswith("CUDA out of memory. Tried to allocate 4096.00 GiB")
    for told, name in ((summed, "cumsum"), (resized, "_upsample_bicubic2d_aa_backward")):
        assert told.startswith(f"aten::{name} on CUDA does not have a deterministic implementation")
    assert waited == ["called a synchronizing CUDA operation"] * 2
    assert sound == "cuda:0"


_NOT_THERE = """
import ctypes, torch
assert torch.ones(1, device="cuda").item() == 1
ctypes.CDLL(None).ncclSend()
"""


def test_what_it_has_not_got_it_says() -> None:
    with pytest.raises(AssertionError, match="rehearsal: ncclSend is not in the rehearsal"):
        rehearsed(_NOT_THERE)


_STEPS = """
import sys
from pathlib import Path
from benchmarks.gpu.correct import measure_agreement
from benchmarks.gpu.record import Record
from benchmarks.gpu.waits import measure_waits
from vipo.runtime import settle_runtime
settle_runtime()
record = Record(Path(sys.argv[1]))
measure_agreement(record, "cuda", ["demo", "sd"])
measure_waits(record, "cuda")
"""


def test_it_computes_what_the_cpu_does_and_counts_the_waits(tmp_path: Path) -> None:
    rehearsed(_STEPS, tmp_path / "figures")
    found = figures(tmp_path / "figures")
    for family in ("demo", "sd"):
        apart = found[f"{family}.relative_differences"]
        assert {key for key, value in apart.items() if value} <= {"update"}
        # A device's maps are by another algorithm than the CPU's.
        assert apart["update"] < 1e-3
        assert found[f"{family}.fp32.max_log_ratio"] == found[f"{family}.bf16.max_log_ratio"] == 0
    # A change here is a host that waits more often, or less: look at `host_waits.*.lines`.
    assert found["host_waits.2_micro_batches"] == 52
    assert found["host_waits.4_micro_batches"] == 80
    assert found["host_waits.a_micro_batch"] == 14
    # Most are the maps', whose small eigenproblem is rounds of few numbers.
    assert found["host_operations.a_micro_batch"]["map"] <= 2116
    assert found["host_operations.a_micro_batch"]["all"] <= 2599


_GRADIENTS = """
import sys
from pathlib import Path
import torch
from families import FAMILIES
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_large
from vipo.config.compose import repository_root
from vipo.determinism import deterministic_algorithms
from vipo.generators import load_generator
from vipo.rewards import in_use, load_reward
deterministic_algorithms()
for name, row in FAMILIES.items():
    config = row.config(row.write(Path(sys.argv[1]) / name), device="cuda")
    generator = load_generator(config, repository_root())
    latents = torch.zeros(1, *generator.latent_shape, device="cuda", requires_grad=True)
    (gradient,) = torch.autograd.grad(generator.pictures(latents, gradient=True).sum(), latents)
    print(name, gradient.isfinite().all().item())
weights = Path(sys.argv[1]) / "raft.safetensors"
save_file(raft_large(weights=None).state_dict(), weights)
reward = load_reward("motion", "cuda", {"path": str(weights)})
clips = torch.rand(1, 2, 3, 32, 48, device="cuda", requires_grad=True)
with in_use(reward):
    (gradient,) = torch.autograd.grad(reward(clips, ["a"], [{}]).scores.sum(), clips)
print("motion", gradient.isfinite().all().item())
"""


def test_gradients_through_autoencoders_and_optical_flow_are_repeatable(tmp_path: Path) -> None:
    """LTX-2's pads by reflection, RAFT samples between pixels: CUDA's backward passes of both are not."""
    found = rehearsed(_GRADIENTS, tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}").splitlines()
    assert [line for line in found if line.endswith((" True", " False"))] == [
        f"{name} True" for name in (*FAMILIES, "motion")
    ]


_RANK = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu import processes
from vipo.config.compose import repository_root
from vipo.ending import end_plainly
from vipo.training import learn
from vipo.training.recorded import train_run
sound, calls = learn.outcomes_of, iter(range(1, 100))
def hanging(*arguments):
    if next(calls) == int(sys.argv[1]):
        time.sleep(10_000)
    return sound(*arguments)
if os.environ["RANK"] == "1":
    learn.outcomes_of = hanging
config = processes.small(sys.argv[3:])
end_plainly(lambda: train_run(config, repository_root(), Path(sys.argv[2]) / config.experiment.name))
"""
_TWO = """
import os, subprocess, sys
from pathlib import Path
from safetensors.torch import load_file
from benchmarks.gpu import processes
from benchmarks.gpu.correct import prepare
from vipo.config.compose import repository_root
from vipo.runtime import settle_runtime
from vipo.training.rendezvous import rendezvous
from vipo.training.setup import set_up
settle_runtime()
results, rank_program = Path(sys.argv[1]) / "results", sys.argv[2]
chosen = processes.overrides(2, "cuda")
experiment = prepare(results, chosen)
setup = set_up(processes.small(chosen), repository_root(), experiment)
before = {name: value.detach().cpu().clone() for name, value in setup.trainable.items()}
expected, _ = processes.trained(setup)
moved = max(float((expected[name] - value).abs().max()) for name, value in before.items())
# Two micro-batches of two transitions each; the second call of the third update.
hang, chosen = "10", [*chosen, "training.updates=3", "training.save_at=[2]"]
chosen += ["distribution.processes=2", "distribution.timeout_seconds=10"]
config = processes.small(chosen)
meeting, ranks = rendezvous(config.distribution, {}), []
for rank in ("0", "1"):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-c", rank_program, hang, results, *chosen]
    ranks.append(subprocess.Popen(command, env=os.environ | meeting | place, stderr=subprocess.PIPE, text=True))
told = ranks[0].communicate()[1]
ranks[1].kill()
ranks[1].communicate()
print(ranks[0].returncode, told.splitlines()[-1])
kept = list((experiment / "runs" / config.run_name / "updates/000002").rglob("*.safetensors"))
found = {name: value for file in kept for name, value in load_file(file).items()}
assert found.keys() == expected.keys()
apart = max(float((found[name] - value).abs().max()) for name, value in expected.items())
print("apart", apart / moved)
"""


def test_two_devices_learn_over_nccl_what_one_does_and_one_that_hangs_is_named(tmp_path: Path) -> None:
    """The other waits in a driver then, where no exception reaches it."""
    found = rehearsed(_TWO, tmp_path, _RANK, REHEARSAL_GPUS="2")
    assert float(found.split()[-1]) < 1e-3
    named = "rank 1 did not come within distribution.timeout_seconds 10: it hangs, or its node is gone"
    assert f"1 error: {named} (last seen at update 3, optimizer step 1, call 2)" in found


# One block of Stable Diffusion 3.5 medium, in its own width, and its autoencoder.
_BLOCK = """
import json
from dataclasses import replace
from functools import partial
from benchmarks.gpu.planned import over_plan
from benchmarks.gpu.rehearsal.peaks import counted_bytes, measured_peaks
from benchmarks.gpu.size import family_overrides
from benchmarks.gpu.sizes import REAL
size = REAL["sd3_lora"]
network = {**size.parts["transformer"], "num_layers": 1, "dual_attention_layers": [0]}
few = ("sampling.steps=2", "training.trained_transitions=1", "training.group_size=2", "training.micro_batch=2")
size = replace(size, parts={**size.parts, "transformer": network}, overrides=(*size.overrides, *few))
overrides = partial(family_overrides, size, device="cuda")
planned = counted_bytes(overrides)
peaks, beside = measured_peaks(overrides)
print(json.dumps(over_plan(peaks, planned, beside)))
"""


def test_the_memory_of_a_real_size_is_what_was_planned() -> None:
    over = json.loads(rehearsed(_BLOCK, REHEARSAL_GHOST="300000").splitlines()[-1])
    assert over.keys() == {"rollout", "decode", "learn"}
    assert {part: ratio for part, ratio in over.items() if not 0.98 < ratio < 1.02} == {}
