"""One family at its real size: an update by part, its memory, its floor, and the published way of doing the same."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.planned import over_plan
from benchmarks.gpu.prepared import prepared_config
from benchmarks.gpu.record import Record
from benchmarks.gpu.size import Size, family_overrides
from benchmarks.timing import seconds_of
from vipo.config.compose import repository_root
from vipo.config.credit import CreditConfig
from vipo.credit import Context, load_sources
from vipo.credit.backbone import BackboneCredit
from vipo.generators.embeddings import stack_conditioning
from vipo.objectives import load_objective
from vipo.perception.backbone import Backbone
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import rollout
from vipo.sampling.transitions import position_log_prob
from vipo.tracking.timer import Timer
from vipo.training.rollouts import Rollouts
from vipo.training.setup import Setup, set_up
from vipo.training.update import assign_credit, update

GIB = 2**30


class MemoryTimer(Timer):
    """Peak of the device's memory by part, beside its time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        with super().__call__(part):
            yield
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self.peaks[part] = max(self.peaks.get(part, 0), peak)


def measure_family(
    record: Record, size: Size, device: str, matmul_tflops: float | None, planned: Mapping[str, int]
) -> None:
    """Note what an update of `size` costs on `device`, part by part.

    Args:
        matmul_tflops: the machine's own matrix product, measured in the same run; None: no share is noted.
        planned: bytes by part, as `vipo plan` counts them.
    """
    record.put("setting", size.setting)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepared_config(family_overrides(size, folder, device), folder)
        start = time.perf_counter()
        setup = set_up(config, repository_root(), folder / config.experiment.name, writes=False)
        record.put("set_up_seconds", round(time.perf_counter() - start, 2))
        _measure(record, setup, matmul_tflops, planned)


def note_update(record: Record, setup: Setup, prefix: str = "") -> tuple[float, dict[str, float]]:
    """Note the second update, under names that begin with `prefix`; its seconds, whole and by part."""
    metrics: dict[str, float] = {}
    setup.timer.pop()
    total = seconds_of(lambda: metrics.update(update(setup, 2)), setup.device)
    parts, training = setup.timer.pop(), setup.config.training
    record.put(f"{prefix}update_seconds", round(total, 3))
    for part, seconds in parts.items():
        record.put(f"{prefix}update_seconds.{part.removeprefix('time/')}", round(seconds, 3))
    samples = training.prompts_per_update * training.group_size
    record.put(f"{prefix}samples_per_gpu_hour", round(3600 * samples / total, 1))
    record.put(f"{prefix}max_log_ratio_before_first_step", metrics["log_ratio/max_before_first_step"])
    return total, parts


def _measure(record: Record, setup: Setup, matmul_tflops: float | None, planned: Mapping[str, int]) -> None:
    config, device = setup.config, setup.device
    counts = {
        "parameters": sum(value.numel() for value in setup.generator.network.parameters()),
        "trained_parameters": sum(value.numel() for value in setup.trainable.values()),
    }
    record.put("parameters", counts)
    if device.type == "cuda":
        record.put("memory_gib.resident", round(torch.cuda.memory_allocated(device) / GIB, 2))
    timer = MemoryTimer(device)
    setup = replace(setup, timer=timer)
    in_bf16: list[float] = []

    def compare(rollouts: Rollouts, weights: Tensor | None) -> None:
        in_bf16.append(bf16_map(record, setup, rollouts, weights))

    warm_up = seconds_of(lambda: update(setup, 1, show=compare), device)
    record.put("warm_up_seconds", round(warm_up - timer.pop()["time/sheet"], 2))
    timer.peaks.clear()
    total, parts = note_update(record, setup)
    record.put("update_seconds.other", round(total - sum(parts.values()), 3))
    for part, peak in timer.peaks.items():
        record.put(f"memory_gib.{part}", round(peak / GIB, 2))
    backbone = backbone_bytes(setup)
    record.put("memory_gib.backbone_weights", round(backbone / GIB, 3))
    for part, share in over_plan(timer.peaks, planned, backbone).items():
        record.put(f"memory_over_plan.{part}", round(share, 4))
    record.put("map_share", round(parts["time/map"] / total, 5))
    record.put("map_bf16.share", round(in_bf16[0] / (total - parts["time/map"] + in_bf16[0]), 5))

    record.put("batch.largest_difference", batch_difference(setup))
    floor = seconds_of(lambda: network_calls(setup), device)
    around = sum(parts[f"time/{part}"] for part in ("decode", "reward", "map"))
    record.put("floor_seconds.network", round(floor, 3))
    record.put("update_over_network_floor", round(total / floor, 4))
    record.put("update_over_floor_with_decode_reward_map", round(total / (floor + around), 4))
    flops = counted_flops(setup)
    record.put("network_pflop_per_update", round(flops / 1e15, 4))
    record.put("achieved_tflops", round(flops / total / 1e12, 2))
    if matmul_tflops is not None:
        record.put("achieved_over_matmul", round(flops / total / 1e12 / matmul_tflops, 4))

    scalar = config.objective.model_copy(update={"ratio": "sample"})
    plain_config = config.model_copy(update={"objective": scalar, "credit": CreditConfig(sources=())})
    plain = replace(setup, sources={}, objective=load_objective(scalar), config=plain_config)
    most = max(timer.peaks.values(), default=0)
    timer.peaks.clear()
    record.put("scalar_baseline_seconds", round(seconds_of(lambda: update(plain, 3), device), 3))
    timer.pop()
    if timer.peaks:
        # It would not have the backbone, which is still there.
        record.put("memory_over_scalar_baseline", round(most / (max(timer.peaks.values()) - backbone), 4))
    record.put("plain_loop_seconds", round(seconds_of(lambda: plain_update(setup), device), 3))


def _inputs(setup: Setup) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    count = setup.config.training.micro_batch
    conditioning = stack_conditioning(setup.embeddings, [next(iter(setup.embeddings))] * count)
    latents = keyed_normal([(0, "floor", i) for i in range(count)], setup.generator.latent_shape, setup.device)
    return conditioning, latents, setup.chain.times[1].expand(count)


def network_calls(setup: Setup) -> None:
    """The unavoidable passes of one update in its own micro-batches, with nothing around them."""
    training, sampling = setup.config.training, setup.config.sampling
    conditioning, latents, time_ = _inputs(setup)
    batches = training.prompts_per_update * training.group_size // training.micro_batch
    with torch.no_grad():
        for _ in range(batches * sampling.steps):
            setup.generator.predict(latents, time_, conditioning)
    for _ in range(batches * training.trained_transitions):
        setup.generator.predict(latents, time_, conditioning).sum().backward()
    setup.optimizer.zero_grad(set_to_none=True)


def bf16_map(record: Record, setup: Setup, rollouts: Rollouts, weights: Tensor | None) -> float:
    """Note how far an update's maps are from `weights`, its own, with the backbone in bf16; gives their seconds."""
    perception = setup.config.perception.model_copy(update={"precision": "bf16"})
    sources = load_sources(setup.config.credit)
    for source in sources.values():
        source.set_up(Context(setup.generator, setup.prompts, setup.rewards, perception, repository_root()))
    half = replace(setup, sources=sources)
    found = assign_credit(half, rollouts).weights
    assert found is not None
    assert weights is not None
    record.put("map_bf16.largest_difference", round(float((found - weights).abs().max()), 4))
    seconds = seconds_of(lambda: assign_credit(half, rollouts), setup.device)
    record.put("map_bf16.seconds", round(seconds, 4))
    return seconds


@torch.no_grad()
def batch_difference(setup: Setup) -> float:
    """How far a sample's prediction alone is from the one in a micro-batch: 0 where kernels are batch-invariant.

    Relative to the prediction's root mean square. Only at 0 may a rollout, or a replay, take other batches than the
    update, and every ratio still be 1 before the first step.
    """
    conditioning, latents, time_ = _inputs(setup)
    together = setup.generator.predict(latents, time_, conditioning)[:1]
    alone = setup.generator.predict(latents[:1], time_[:1], {name: value[:1] for name, value in conditioning.items()})
    return float((together - alone).abs().max() / together.square().mean().sqrt())


def counted_flops(setup: Setup) -> float:
    """Floating point operations of the network in one update, counted on one call of each kind."""
    training, sampling = setup.config.training, setup.config.sampling
    conditioning, latents, time_ = _inputs(setup)
    batches = training.prompts_per_update * training.group_size // training.micro_batch
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        setup.generator.predict(latents, time_, conditioning)
    with FlopCounterMode(display=False) as learned:
        setup.generator.predict(latents, time_, conditioning).sum().backward()
    setup.optimizer.zero_grad(set_to_none=True)
    return batches * (
        sampling.steps * forward.get_total_flops() + training.trained_transitions * learned.get_total_flops()
    )


def plain_update(setup: Setup) -> None:
    """One update as the published loops are written: one sample at a time, maps by scikit-learn and SciPy a picture."""
    config, generator, chain = setup.config, setup.generator, setup.chain
    prompt = next(iter(setup.embeddings))
    conditioning = stack_conditioning(setup.embeddings, [prompt])
    stochastic = range(len(chain.trainable))
    found = []
    for i in range(config.training.group_size):
        path = rollout(generator, conditioning, chain, stochastic, [(0, "initial", prompt)], [(0, "plain", prompt, i)])
        pictures = generator.pictures(path.clean)[0]
        reward = float((pictures[..., 0, :, :] - pictures[..., 1:, :, :].mean(dim=-3)).mean())
        found.append((path, reward, torch.from_numpy(_plain_map(setup, pictures)).to(setup.device)))
    rewards = np.array([reward for _, reward, _ in found])
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    transitions = config.training.trained_transitions
    for (path, _, weights), advantage in zip(found, advantages, strict=True):
        for step in range(transitions):
            index = torch.tensor([step], device=setup.device)
            latents, value, old_mean = path.at(index)
            prediction = generator.predict(latents, chain.times[index], conditioning)
            mean, std = chain.gaussian(latents, prediction, index)
            new, old = (position_log_prob(value, each, std) for each in (mean, old_mean))
            loss = -((new - old).exp() * float(advantage) * weights).mean()
            (loss / (transitions * len(found))).backward()
    torch.nn.utils.clip_grad_norm_(setup.trainable.values(), 1.0)
    setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)


def _backbone(setup: Setup) -> Backbone:
    source = setup.sources["backbone"]
    assert isinstance(source, BackboneCredit)
    return source.structuring.backbone


def backbone_bytes(setup: Setup) -> int:
    """Of its weights and buffers."""
    module = _backbone(setup)
    return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))


def _plain_map(setup: Setup, pictures: Tensor) -> np.ndarray:
    backbone, (height, width) = _backbone(setup), setup.generator.grid
    maps = []
    for picture in pictures.unsqueeze(0) if pictures.ndim == 3 else pictures:
        cells = backbone(picture[None])[0].cpu().numpy()
        pca = PCA(n_components=3)
        scores = pca.fit_transform(cells.reshape(len(cells), -1).T).T.reshape(3, *cells.shape[1:])
        heat = sum(
            share * (z - z.min()) / (np.ptp(z) + 1e-8)
            for z, share in zip(scores, pca.explained_variance_ratio_, strict=True)
        )
        smooth = torch.from_numpy(gaussian_filter(heat, 1.0))[None, None]
        latent = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear", antialias=True)[0, 0]
        maps.append((latent - latent.min()) / (latent.max() - latent.min() + 1e-8))
    stacked = torch.stack(maps).float()
    groups = setup.generator.frame_groups
    if groups is None:
        return stacked[0].numpy()
    return torch.stack([stacked[list(group)].mean(dim=0) for group in groups]).numpy()
