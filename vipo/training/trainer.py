"""The trainer: one readable loop from rollout to checkpoint.

One update: sample ``prompts_per_update x group_size`` trajectories with the current policy, decode, score and
map them, form advantages, then take ``optimizer_steps_per_update`` steps on the clipped surrogate. The order of
samples is ``(optimizer step, prompt, sample)``, so that every step holds the same share of every group, and the
micro-batches of the rollout are those of the update: the same network calls, hence ratios of exactly one.
"""

import contextlib
import copy
import json
import logging
import math
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vipo.config.compose import dump_config
from vipo.config.experiment import check_processes
from vipo.config.models import Config, config_hash
from vipo.demo.scenes import object_coverage
from vipo.determinism import deterministic_algorithms
from vipo.errors import Preempted
from vipo.generators import load_generator
from vipo.generators.base import checkpoint_inputs
from vipo.generators.embeddings import load_embeddings, stack_conditioning
from vipo.memory import memory_errors
from vipo.objectives import (
    allocate_advantages,
    best_and_worst,
    clipped_surrogate,
    group_advantages,
    normalized_log_ratio,
    weight_maps,
)
from vipo.perception import AllocationMaps, PerceptualStructuring, load_backbone
from vipo.perception.allocator import finish
from vipo.perception.backbones import NOT_MEASURED
from vipo.prompts import read_prompts
from vipo.provenance import code_identity, record_stage, run_lock
from vipo.provenance.files import atomic_file, atomic_folder, file_sha256, text_lines
from vipo.provenance.lineage import PROVENANCE
from vipo.provenance.superseded import is_finished, set_aside
from vipo.rewards import RewardError, load_reward, score
from vipo.sampling.chain import Chain, chain_remarks, sampling_chain, stochastic_steps
from vipo.sampling.noise import Key, keyed_generator
from vipo.sampling.rollout import TransitionBatch, policy_transition, rollout
from vipo.sampling.transitions import position_kl, position_log_prob
from vipo.signals import handled
from vipo.tracking import Timer, Tracker
from vipo.tracking.progress import progress_bar
from vipo.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    check_optimizer,
    check_state,
    check_tensors,
    load_newest,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    prune_checkpoints,
    save_checkpoint,
)
from vipo.training.distribution import Distribution, own_rows
from vipo.training.samples import (
    MicroBatch,
    Sample,
    TrainingError,
    arrange_samples,
    chosen_transitions,
    concatenated,
    update_prompts,
)

log = logging.getLogger(__name__)

_UNKNOWN_CODE = {"package_sha256": None, "commit": None, "dirty": None}


def map_entropy(maps: Tensor) -> Tensor:
    """Entropy of each map as a distribution over positions, relative to the uniform one: ``(N,)`` in [0, 1]."""
    flat = maps.flatten(1).double()
    share = flat / flat.sum(dim=1, keepdim=True)
    return -(torch.special.xlogy(share, share).sum(dim=1) / math.log(flat.shape[1])).float()


def _named(sample: Sample) -> str:
    return f"{sample.index} of {sample.prompt.text!r}"


_UPDATE_REMEDY = (
    "The newest checkpoint is the last good state; lower training.micro_batch or the generator's size, or set "
    "training.gradient_checkpointing=true, training.lora={}, generator.precision=bf16, or distribution.strategy=fsdp "
    "with more processes"
)
_STATE_REMEDY = (
    "That is weights, gradients, AdamW's state, and with objective.kl_weight the reference: set training.lora={}, or "
    "distribution.strategy=fsdp with more processes (each loads the whole network once, so that one device must hold "
    "it), choose a smaller generator, or raise cluster.train.memory_mb where main memory ran out"
)


class Trainer:
    """Post-trains one run. `run` is the loop; everything above it is one part of an update."""

    def __init__(self, config: Config, root: Path, experiment: Path) -> None:
        """Load everything and check it before the first computation.

        Args:
            config: the run.
            root: repository root, for relative paths.
            experiment: ``results/<experiment>`` with prompts and embeddings.

        Raises:
            ConfigError, TrainingError, GeneratorError, RewardError, PerceptionError, PromptError: what cannot work.
        """
        if config.is_base:
            raise TrainingError(
                "arm 'base' is the generator as it is: there is nothing to train; choose another arm, or evaluate it"
            )
        deterministic_algorithms()
        check_processes(config)
        self.config = config
        self.folder = experiment / "runs" / config.run_name
        self.prompts_path = experiment / "prompts" / "train.jsonl"
        self.embeddings_path = experiment / "embeddings" / "train.safetensors"
        self.distribution = Distribution(config.distribution, config.generator.device)
        # After accelerate, which on several CPU processes takes the number of threads from the machine.
        torch.set_num_threads(config.training.threads)
        self.device = self.distribution.device
        self.prompts = read_prompts(self.prompts_path)
        update_prompts(self.prompts, config.seed, 1, config.training.prompts_per_update)
        self.generator = load_generator(config.generator, root)
        self.weight_inputs = {
            f"generator {i}": path for i, path in enumerate(checkpoint_inputs(config.generator, root))
        }
        widths = self.generator.conditioning_widths(config.generator, root)
        self.embeddings = load_embeddings(self.embeddings_path, self.prompts, self.device, widths)
        self.rewards = {term.name: load_reward(term.name, config.generator.device) for term in config.reward.terms}
        self.structuring = self._load_structuring(root)
        if self.structuring is not None and self.structuring.backbone.source is not None:
            self.weight_inputs["perception"] = self.structuring.backbone.source
        self._try_rewards()
        self.chain = self._load_chain()
        self._prepare_network()
        self._check_resources()
        self.timer = Timer(self.device)
        self.stop_signal: int | None = None
        self._identity: str | None = None
        self.code = code_identity() if self.distribution.is_main else _UNKNOWN_CODE
        #: Of the main process: each code that made updates so far, in order.
        self.made_by: list[dict[str, Any]] = []

    def _load_chain(self) -> Chain:
        generator, sampling = self.generator, self.config.sampling
        schedule = (generator.prediction, generator.alphas_cumprod, generator.timesteps)
        chain = sampling_chain(sampling, *schedule, device=self.device)
        # What only the evaluation would refuse, before all training.
        sampling_chain(sampling, *schedule, steps=self.config.evaluation.steps)
        training = None if generator.alphas_cumprod is None else len(generator.alphas_cumprod)
        for remark in (
            chain_remarks(chain, sampling, generator.flow_shift, training) if self.distribution.is_main else ()
        ):
            log.warning("%s", remark)
        return chain

    def _load_structuring(self, root: Path) -> PerceptualStructuring | None:
        if self.config.objective.map == "oracle":
            without = [prompt.text for prompt in self.prompts if "objects" not in prompt.metadata]
            if without or self.generator.frame_groups is not None:
                lacks = f"{without[0]!r} has none" if without else "this generator makes videos"
                raise TrainingError(
                    f"objective.map 'oracle' needs drawn pictures and prompts with scene metadata ('objects'): {lacks}"
                )
        if not self.config.objective.reads_backbone:
            return None
        backbone = load_backbone(self.config.perception, self.config.generator.device, root)
        structuring = PerceptualStructuring(backbone, self.config.perception)
        structuring.preflight((self.config.generator.height, self.config.generator.width))
        if structuring.evidence == NOT_MEASURED and self.distribution.is_main:
            log.warning(
                "perception.orientation: whether %r finds the object with %r at this layer and size was not measured "
                "here; look at `vipo map` of pictures of your kind, or measure it with `vipo orientation`",
                structuring.orientation,
                self.config.perception.backbone,
            )
        return structuring

    def _try_rewards(self) -> None:
        blank = torch.zeros(1, *self.config.generator.sample_shape, device=self.device)
        for name, reward in self.rewards.items():
            score(name, reward, blank, [self.prompts[0].text], [self.prompts[0].metadata])

    def _prepare_network(self) -> None:
        config, training = self.config, self.config.training
        if training.gradient_checkpointing:
            self.generator.recompute_activations()
        # The generator as it was: with LoRA, the network without its adapter.
        copied = config.objective.kl_weight > 0 and training.lora is None
        reference = copy.deepcopy(self.generator.network) if copied else None
        if training.lora is None:
            self.generator.network.requires_grad_(True)
        else:
            self.generator.add_lora(training.lora, config.seed)
        precision = config.generator.precision
        self.generator.network = self.distribution.wrap(self.generator.network, precision)
        self.reference = None if reference is None else self.distribution.wrap(reference, precision)
        network = self.distribution.unwrap(self.generator.network)
        self.trainable = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )

    def _check_resources(self) -> None:
        count = sum(value.numel() for value in self.trainable.values())
        needed = 4 * count * (3 * self.config.training.keep_checkpoints + 3 + 1 + len(self.config.training.save_at))
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise TrainingError(
                f"{self.folder}: {free / 2**20:.0f} MiB free, about {needed / 2**20:.0f} MiB are needed; "
                "free space or lower training.keep_checkpoints"
            )
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            frozen = 0 if self.reference is None else sum(value.numel() for value in self.reference.parameters())
            shards = self.distribution.processes if self.config.distribution.strategy == "fsdp" else 1
            state = (16 * count + 4 * frozen) / shards
            if state > total:
                raise TrainingError(
                    f"weights, gradients and AdamW state of {count / 1e9:.1f} G parameters, and the reference of "
                    f"objective.kl_weight, need {state / 2**30:.0f} GiB in each process, the device has "
                    f"{total / 2**30:.0f}; use training.lora, or distribution.strategy=fsdp on more devices"
                )

    # ---- one update -------------------------------------------------------------------------------

    def update(self, number: int) -> dict[str, float]:
        """One update: rollout, scores, maps, advantages, optimizer steps. Returns its metrics."""
        self.distribution.at(number)
        samples = arrange_samples(
            update_prompts(self.prompts, self.config.seed, number, self.config.training.prompts_per_update),
            self.config.training.group_size,
            self.config.training.optimizer_steps_per_update,
        )
        batches, images = self._rollout(samples, number)
        with self.timer("reward"):
            rewards = self._score(samples, batches, images)
        weights = {term.name: term.weight for term in self.config.reward.terms}
        groups = torch.tensor([sample.group for sample in samples])
        objective = self.config.objective
        with self.timer("map"):
            maps, map_metrics = self._maps(samples, groups, batches, images, number)
        # The pictures of an update are many, and learning is where memory peaks.
        del images
        result = group_advantages(
            rewards,
            weights,
            groups,
            objective.std_floor,
            objective.advantage_clip,
            objective.std,
            maps.cpu() if maps is not None and objective.map_on == "reward" else None,
        )
        if not bool(result.valid.any()):
            raise RewardError(f"update {number}: no sample has a finite reward; check the rewards {', '.join(rewards)}")
        for row in torch.nonzero(~result.valid).flatten().tolist():
            log.warning(
                "update %d: sample %d of %r left out, its reward is not finite",
                number,
                samples[row].index,
                samples[row].prompt.text,
            )
        metrics = self._reward_metrics(rewards, weights, result.valid)
        metrics["group/std"] = float(result.group_std.mean())
        metrics["group/zero_std_share"] = float(result.zero_std.float().mean())
        advantages = result.values.to(self.device)
        if maps is not None and objective.map_on == "advantage":
            advantages = allocate_advantages(advantages, maps)
        if self.config.training.best_of is not None:
            batches = self._select(batches, result.values, groups, self.config.training.best_of)
        with self.timer("learn"):
            return metrics | map_metrics | self._learn(batches, advantages, samples, number)

    def _rollout(self, samples: list[Sample], number: int) -> tuple[list[MicroBatch], list[Tensor]]:
        config, size = self.config, self.config.training.micro_batch
        stochastic = stochastic_steps(config.sampling.window, len(self.chain.trainable), config.seed, number)
        transitions = chosen_transitions(samples, config.training, stochastic, config.seed, number).to(self.device)
        batches, images = [], []
        for position, start in enumerate(range(0, len(samples), size)):
            if position % self.distribution.data_processes != self.distribution.data_rank:
                continue
            self._stop_if_asked(number - 1)
            chunk = samples[start : start + size]
            conditioning = stack_conditioning(self.embeddings, [sample.prompt.id for sample in chunk])
            initial: list[Key] = [
                (config.seed, "initial", number, s.prompt.id, -1 if config.sampling.same_initial_noise else s.index)
                for s in chunk
            ]
            steps: list[Key] = [(config.seed, "step", number, s.prompt.id, s.index) for s in chunk]
            with self.timer("rollout"):
                trajectory = rollout(self.generator, conditioning, self.chain, stochastic, initial, steps)
            rows = tuple(range(start, start + len(chunk)))
            batches.append(MicroBatch(rows, conditioning, trajectory, transitions[start : start + size]))
            with self.timer("decode"):
                images.append(self.generator.pictures(trajectory.clean))
        return batches, images

    def _score(self, samples: list[Sample], batches: list[MicroBatch], images: list[Tensor]) -> dict[str, Tensor]:
        rewards = {name: torch.full((len(samples),), torch.nan) for name in self.rewards}
        for batch, pictures in zip(batches, images, strict=True):
            own = [samples[row] for row in batch.rows]
            for name, reward in self.rewards.items():
                values = score(name, reward, pictures, [s.prompt.text for s in own], [s.prompt.metadata for s in own])
                rewards[name][list(batch.rows)] = values
        rows = [row for batch in batches for row in batch.rows]
        return {name: self._in_order(values[rows], batches).cpu() for name, values in rewards.items()}

    def _in_order(self, local: Tensor, batches: list[MicroBatch]) -> Tensor:
        """Values ``(n, ...)`` of this process's samples, gathered to ``(N, ...)`` in the order of all samples."""
        return self.distribution.in_order(local, [row for batch in batches for row in batch.rows])

    def _reward_metrics(self, rewards: dict[str, Tensor], weights: dict[str, float], valid: Tensor) -> dict[str, float]:
        total = torch.stack([weights[name] * values.double() for name, values in rewards.items()]).sum(dim=0)[valid]
        metrics = {
            "reward/mean": float(total.mean()),
            "reward/std": float(total.std(correction=0)),
            "samples/invalid": float((~valid).sum()),
        }
        return metrics | {
            f"reward/{name}/mean": float(values.double()[valid].mean()) for name, values in rewards.items()
        }

    def _maps(
        self, samples: list[Sample], groups: Tensor, batches: list[MicroBatch], images: list[Tensor], number: int
    ) -> tuple[Tensor | None, dict[str, float]]:
        """The weights ``(N, [T,] H, W)`` of all samples, in their order, and what the metrics say of them."""
        kind = self.config.objective.map
        if kind == "none":
            return None, {}
        found = [self._source_maps(pictures) for pictures in images]
        # After the last batch: on an accelerator, reading a flag waits for everything before it.
        for part in found:
            part.check()
        maps = self._in_order(torch.cat([part.maps for part in found]), batches)
        constant = self._in_order(torch.cat([part.constant for part in found]), batches)
        converged = self._in_order(torch.cat([part.converged for part in found]), batches)
        permutations = None
        if kind == "shuffled":
            positions = maps[0].numel()
            keys: list[Key] = [(self.config.seed, "shuffle", number, s.prompt.id, s.index) for s in samples]
            permutations = torch.stack([torch.randperm(positions, generator=keyed_generator(*key)) for key in keys]).to(
                maps.device
            )
        weights = weight_maps(
            kind, maps, constant, self.config.perception.normalize, groups.to(maps.device), permutations
        )
        return weights, {
            "map/mean": float(weights.mean()),
            "map/entropy": float(map_entropy(weights).mean()),
            "map/constant_share": float(constant.float().mean()),
            "map/unconverged_share": float((~converged).float().mean()),
        }

    def _source_maps(self, images: Tensor) -> AllocationMaps:
        size = self.generator.grid
        if self.structuring is not None:
            return self.structuring(images, size, self.generator.frame_groups)
        if self.config.objective.map == "oracle":
            coverage, perception = object_coverage(images, size), self.config.perception
            constant = coverage.amax(dim=(1, 2)) == 0
            maps = finish(
                coverage,
                constant,
                torch.ones_like(constant),
                normalize=perception.normalize,
                exponent=perception.exponent,
                floor=perception.floor,
            )
        else:
            maps = torch.ones(len(images), *self.generator.latent_shape[1:], device=images.device)
            constant = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        sound = torch.ones_like(constant)
        return AllocationMaps(maps, constant, sound, sound)

    def _select(self, batches: list[MicroBatch], values: Tensor, groups: Tensor, count: int) -> list[MicroBatch]:
        ranked = best_and_worst(values.flatten(1).mean(dim=1) if values.ndim > 1 else values, groups, count)
        share = count // self.config.training.optimizer_steps_per_update
        # As for all samples: (optimizer step, prompt, sample).
        rows = [row for part in ranked.split(share, dim=1) for row in part.flatten().tolist()]
        whole = concatenated(batches, lambda local: self._in_order(local, batches))
        chunks = [rows[start : start + len(batches[0].rows)] for start in range(0, len(rows), len(batches[0].rows))]
        return [
            whole.select(chunk) for chunk in chunks[self.distribution.data_rank :: self.distribution.data_processes]
        ]

    def _learn(
        self, batches: list[MicroBatch], advantages: Tensor, samples: list[Sample], number: int
    ) -> dict[str, float]:
        training, objective = self.config.training, self.config.objective
        per_step = len(batches) // training.optimizer_steps_per_update
        slots = training.trained_transitions
        losses, norms, divergences, largest = [], [], [], 0.0
        clipped = torch.zeros(self.config.sampling.steps - 1, device=self.device)
        seen = torch.zeros_like(clipped)
        # Sums of squares of log rho: before the first step it is noise, after it the policy's change.
        noise, change, changes = torch.zeros((), device=self.device), torch.zeros(2, device=self.device), 0
        calls: list[tuple[Tensor, MicroBatch, Tensor]] = []
        for step in range(training.epochs * training.optimizer_steps_per_update):
            first = (step % training.optimizer_steps_per_update) * per_step
            loss_sum = torch.zeros((), device=self.device)
            calls.clear()
            for index in range(first, first + per_step):
                batch = batches[index]
                own = advantages[list(batch.rows)]
                for slot in range(slots):
                    self.distribution.at(number, step + 1, (index - first) * slots + slot + 1)
                    last = index == first + per_step - 1 and slot == slots - 1
                    with self.distribution.gradients(self.generator.network, last):
                        which = batch.steps[:, slot]
                        moved = policy_transition(
                            self.generator, batch.conditioning, batch.trajectory, which, self.chain
                        )
                        log_ratio = self._log_ratio(moved)
                        if step == 0:
                            noise_now = log_ratio.detach()
                            largest = max(largest, self._check_consistency(noise_now, batch, which, samples, number))
                            noise += noise_now.square().mean() / (per_step * slots)
                        weights = None
                        if objective.ratio_norm == "guard":
                            log_ratio, weights = self._guarded(log_ratio, moved, which)
                        if step > 0:
                            seen_by_gate = log_ratio.detach()
                            means = seen_by_gate.flatten(1).mean(dim=1)
                            change += torch.stack([means.square().mean(), seen_by_gate.square().mean()])
                            changes += 1
                        surrogate = clipped_surrogate(
                            log_ratio,
                            own,
                            ratio=objective.ratio,
                            side=objective.clip.side,
                            scope=objective.clip.scope,
                            clip_range=objective.clip.range,
                            weights=weights,
                        )
                        loss = surrogate.loss
                        if objective.kl_weight > 0:
                            kl = self._kl(moved, batch, which)
                            divergences.append(kl.detach())
                            loss = loss + objective.kl_weight * kl
                        loss = loss / (per_step * slots)
                        loss.backward()
                    calls.append((loss.detach(), batch, which))
                    loss_sum += loss.detach()
                    # At an update's first step every ratio is 1: nothing can be clipped there.
                    if step > 0:
                        clipped.index_add_(0, which, surrogate.clipped)
                        seen.index_add_(0, which, torch.ones_like(surrogate.clipped))
            norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.config.optimizer.max_grad_norm)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not bool(torch.isfinite(norm)):
                raise TrainingError(
                    f"update {number}, optimizer step {step + 1}: the gradient is not finite, "
                    f"{self._bad_calls(calls, samples)}; nothing of it was applied, and the newest checkpoint is the "
                    "last good state. A lower optimizer.learning_rate, or generator.precision=fp32, avoids most such "
                    "cases"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss_sum))
            norms.append(float(norm))
        count, total = self.distribution.processes, self.distribution.total
        clipped, seen = total(clipped), total(seen)
        noise, change, changes = total(noise) / count, total(change), changes * count
        largest = self.distribution.largest(largest)
        metrics = {
            "loss": float(total(torch.tensor(sum(losses) / len(losses), dtype=torch.float64))) / count,
            "grad/norm": sum(norms) / len(norms),
            "log_ratio/max_before_first_step": largest,
            "log_ratio/rms_before_first_step": float(noise.sqrt()),
            # With one optimizer step an update, no step has a ratio other than 1.
            "clip/share": float(clipped.sum() / seen.sum()) if changes else 0.0,
        }
        if changes:
            sample, position = (change / changes).sqrt().tolist()
            metrics |= {"log_ratio/rms_sample": sample, "log_ratio/rms_position": position}
        if divergences:
            metrics["kl"] = float(total(torch.stack(divergences).mean()) / count)
        return metrics | {f"clip/share_t{t}": float(clipped[t] / seen[t]) for t in range(len(seen)) if float(seen[t])}

    def _bad_calls(self, calls: list[tuple[Tensor, MicroBatch, Tensor]], samples: list[Sample]) -> str:
        """Which micro-batches of an optimizer step, of all processes, have a loss that is not finite."""
        found = [
            f"transitions {steps.tolist()} of samples {', '.join(_named(samples[row]) for row in batch.rows)}"
            for loss, batch, steps in calls
            if not bool(torch.isfinite(loss))
        ]
        everyones = [text for texts in self.distribution.everyones(found) for text in texts]
        return "and so is the loss of " + "; ".join(everyones) if everyones else "although every loss of it is"

    def _log_ratio(self, moved: TransitionBatch) -> Tensor:
        objective = self.config.objective
        new, old = (
            position_log_prob(moved.value, mean, moved.std, objective.channels, objective.density)
            for mean in (moved.mean, moved.old_mean)
        )
        return new - old

    def _guarded(self, log_ratio: Tensor, moved: TransitionBatch, steps: Tensor) -> tuple[Tensor, Tensor]:
        kl = position_kl(moved.mean, moved.old_mean, moved.std, self.config.objective.channels)
        # GRPO-Guard's second half: a step's gradient is proportional to dt, this makes the steps count alike.
        weights = 1 / (self.chain.levels[steps] - self.chain.levels[steps + 1])
        return normalized_log_ratio(log_ratio, kl, moved.std.flatten()), weights

    def _kl(self, moved: TransitionBatch, batch: MicroBatch, steps: Tensor) -> Tensor:
        with torch.no_grad(), self._reference_policy():
            prediction = self.generator.predict(moved.latents, self.chain.times[steps], batch.conditioning)
            mean, _ = self.chain.gaussian(moved.latents, prediction, steps)
        return position_kl(moved.mean, mean, moved.std, self.config.objective.channels).mean()

    @contextlib.contextmanager
    def _reference_policy(self) -> Iterator[None]:
        policy = self.generator.network
        # The network itself: a second call of its distributed wrapper before the backward pass would disturb that.
        network: Any = self.distribution.unwrap(policy) if self.reference is None else self.reference
        self.generator.network = network
        if self.reference is None:
            network.disable_adapters()
        try:
            yield
        finally:
            if self.reference is None:
                network.enable_adapters()
            self.generator.network = policy

    def _check_consistency(
        self, log_ratio: Tensor, batch: MicroBatch, steps: Tensor, samples: list[Sample], number: int
    ) -> float:
        largest = float(log_ratio.abs().max())
        tolerance = self.config.training.log_ratio_tolerance
        if largest <= tolerance:
            return largest
        # NaN counts as the largest.
        row, *place = (int(i) for i in torch.unravel_index(log_ratio.abs().argmax(), log_ratio.shape))
        sample = samples[batch.rows[row]]
        if not math.isfinite(largest):
            raise TrainingError(
                f"update {number}: log rho is not finite at {tuple(place)} of transition {int(steps[row])}, sample "
                f"{_named(sample)}: the policy's prediction there is not. The newest checkpoint is the last good "
                "state; a lower optimizer.learning_rate, or generator.precision=fp32, avoids most such cases"
            )
        raise TrainingError(
            f"update {number}: max |log rho| before the first optimizer step is {largest:.3g}, above "
            f"training.log_ratio_tolerance {tolerance:.3g}, at {tuple(place)} of transition {int(steps[row])}, "
            f"sample {_named(sample)}. Rollout and update do not evaluate the same network: a "
            "dropout or norm layer in training mode, another dtype or autocast, a kernel that depends on gradients. "
            "Rounding alone gives log rho the size of its error in the transition's mean over the transition's std, "
            f"divided by sqrt(channels) for objective.channels 'mean' and times it for 'sum' (here "
            f"{self.config.objective.channels!r}): docs/method.md tells how to choose the tolerance by it"
        )

    # ---- state ------------------------------------------------------------------------------------

    def identity(self) -> str:
        """Hash of everything that decides the run's result; a checkpoint of another identity is never resumed.

        Read once: the weights of a large generator take a while.
        """
        if self._identity is not None:
            return self._identity
        inputs = {path.name: file_sha256(path) for path in (self.prompts_path, self.embeddings_path)}
        for name, path in self.weight_inputs.items():
            # Configurations too: a scheduler's or an autoencoder's numbers decide the chain and the pictures. How the
            # folder was made decides nothing.
            files = [path] if path.is_file() else sorted([*path.rglob("*.safetensors"), *path.rglob("*.json")])
            found = [[str(file.relative_to(path)), file_sha256(file)] for file in files if file != path / PROVENANCE]
            inputs[name] = config_hash(found)
        self._identity = config_hash({"config": self.config.training_identity(), "inputs": inputs})
        return self._identity

    def packages(self) -> list[str | None]:
        """Hashes of the packages that made the updates so far, in order; None for one that is not known."""
        return [made["package_sha256"] for made in self.made_by]

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that cannot be gone on from, although its bytes are those of its manifest.

        Of a run of another configuration the tensors may be any: it is set aside.
        """
        what = f"checkpoint {checkpoint.update} of {self.config.run_name}"
        check_state(checkpoint, {"identity": str, "metrics": str, "config": str})
        try:
            rows = [json.loads(line) for line in text_lines(checkpoint.state["metrics"])]
            told = [row["update"] for row in rows]
            codes = [dict(code)["package_sha256"] for code in checkpoint.state.get("code", [_UNKNOWN_CODE])]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{what}: damaged (its metrics or code: {type(error).__name__}: {error})") from error
        if told != list(range(1, checkpoint.update + 1)) or not codes:
            raise CheckpointError(f"{what}: damaged (its metrics are not those of updates 1 to {checkpoint.update})")
        if checkpoint.state["identity"] == self.identity():
            tensors, count = checkpoint.tensors, checkpoint.state.get("optimizer_tensors")
            check_tensors(tensors.below("network"), self.trainable, what)
            parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
            check_optimizer(tensors.below("optimizer"), parameters, count, what)

    def set_aside_other(self) -> None:
        """Move a run of another configuration or other inputs out of the folder, so that a fresh one can start."""
        newest = load_newest(self._checkpoints, self._check)
        if newest is not None and newest.state["identity"] == self.identity():
            return
        if newest is not None:
            # What a workflow deleted before it started this process.
            for text, file in ((newest.state["metrics"], "metrics.jsonl"), (newest.state["config"], "config.yaml")):
                if not (self.folder / file).is_file():
                    (self.folder / file).write_text(text, encoding="utf-8")
        elif not is_finished(self.folder, "train"):
            return
        aside = set_aside(self.folder.parents[1], [self.folder])
        why = "came without checkpoints" if newest is None else "was made by another configuration or other inputs"
        log.warning("%s %s: set aside in %s, a fresh run starts", self.folder, why, aside)

    def _resumable(self) -> Checkpoint | None:
        newest = load_newest(self._checkpoints, self._check)
        if newest is None:
            return None
        kept = [update for update in self.config.training.save_at if update <= newest.update]
        lost = [update for update in kept if not (self.folder / "updates" / f"{update:06d}").is_dir()]
        if lost:
            log.warning(
                "%s: the kept weights of update %s are gone; the run starts again",
                self.folder,
                ", ".join(map(str, lost)),
            )
            return None
        return newest

    def _restore(self, checkpoint: Checkpoint) -> None:
        weights = checkpoint.tensors.below("network")
        with torch.no_grad():
            for name, value in self.trainable.items():
                value.copy_(weights.like(name, value))
        load_optimizer_tensors(self.optimizer, checkpoint.tensors.below("optimizer"))

    def _check_weights(self, number: int) -> None:
        """Refuse to keep weights that are not finite: every later step would start from them.

        Raises:
            TrainingError: a tensor is not finite; the message names it.
        """
        finite = {name: own_rows(value)[0].isfinite().all() for name, value in self.trainable.items()}
        found = [name for name, sound in finite.items() if not bool(sound)]
        bad = [name for names in self.distribution.everyones(found) for name in names]
        if bad:
            raise TrainingError(
                f"update {number}: the weights are not finite after it, first {bad[0]!r}; nothing of them was kept, "
                "and the newest checkpoint is the last good state. A lower optimizer.learning_rate helps"
            )

    def _save(self, update: int, identity: str, tracker: Tracker | None) -> None:
        with self.timer("checkpoint"):
            self._check_weights(update)
            state = {}
            moments = optimizer_tensors(self.optimizer)
            if tracker is not None:
                tracker.flush()
                # The metrics travel with the checkpoint: a workflow that deletes a killed job's outputs loses nothing.
                state = {
                    "identity": identity,
                    "metrics": tracker.metrics,
                    "config": dump_config(self.config),
                    "code": self.made_by,
                    "optimizer_tensors": len(moments),
                }
            tensors = prefixed("network", dict(self.trainable))
            tensors |= prefixed("optimizer", moments)
            save_checkpoint(self._checkpoints, update, tensors, state, self.distribution)
            if self.distribution.is_main:
                prune_checkpoints(self._checkpoints, update, self.config.training.keep_checkpoints)
            # A process that ends before the checkpoint is there might be taken for a failure that ends the others.
            self.distribution.meet()

    def _save_weights(self, folder: Path) -> None:
        wrapped = self.generator.network
        self.generator.network = self.distribution.unwrap(wrapped)
        state = self.distribution.full_state(self.generator.network)
        if self.distribution.is_main:
            with atomic_folder(folder) as temporary:
                self.generator.save_network(temporary, state)
        self.generator.network = wrapped

    def _stop_if_asked(self, finished: int) -> None:
        # All processes stop at the same place, whichever of them the signal reached.
        stop = int(self.distribution.largest(self.stop_signal or 0))
        if stop:
            raise Preempted(
                f"stopped by {signal.Signals(stop).name} after update {finished}; "
                "start the same command again to go on from there"
            )

    def _remember(self, number: int) -> None:
        self.stop_signal = number

    def _timing(self) -> dict[str, float]:
        parts = self.timer.pop()
        inside = sum(seconds for name, seconds in parts.items() if name not in ("time/total", "time/checkpoint"))
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return parts | {"time/other": parts["time/total"] - inside, "memory/peak_bytes": float(memory)}

    # ---- the loop ---------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end, resuming where an earlier process stopped; returns the folder of the final weights.

        Raises:
            Preempted: SIGTERM or SIGUSR1 arrived; the newest checkpoint holds every finished update.
        """
        training = self.config.training
        main = self.distribution.is_main
        stopped = handled(self._remember, signal.SIGTERM, signal.SIGUSR1)
        with stopped, self.distribution.named_hangs():
            identity = self.identity()
            # The main process may be setting another configuration's run aside.
            self.distribution.meet()
            newest = self._resumable()
            start = 0 if newest is None else newest.update
            views = self.distribution.everyones([start, identity])
            if any(view != views[0] for view in views):
                raise TrainingError(
                    f"{self._checkpoints}: the processes do not see the same newest checkpoint and inputs (update and "
                    f"identity by rank: {views}); put results and inputs on a disk that all nodes share"
                )
            if main:
                if newest is None:
                    # Kept weights of a run that was cut off before its first checkpoint are not this one's.
                    shutil.rmtree(self.folder / "updates", ignore_errors=True)
                # An output of every run, whether or not training.save_at fills it.
                (self.folder / "updates").mkdir(exist_ok=True)
            if newest is not None:
                self._restore(newest)
                log.info("%s: resumed after update %d of %d", self.config.run_name, start, training.updates)
            if main:
                if newest is not None:
                    # A checkpoint of an earlier format does not tell.
                    self.made_by = list(newest.state.get("code", [_UNKNOWN_CODE]))
                with atomic_file(self.folder / "metrics.jsonl") as path:
                    path.write_text("" if newest is None else newest.state["metrics"], encoding="utf-8")
                with atomic_file(self.folder / "config.yaml") as path:
                    path.write_text(dump_config(self.config), encoding="utf-8")
            with contextlib.ExitStack() as stack:
                tracker = stack.enter_context(Tracker(self.folder, start)) if main else None
                progress = stack.enter_context(
                    progress_bar(
                        total=training.updates,
                        done=start,
                        description=self.config.run_name,
                        unit="update",
                        disable=not main,
                    )
                )
                done = saved = start
                first = None if newest is None else json.loads(newest.state["metrics"].splitlines()[0])["reward/mean"]
                try:
                    for number in range(start + 1, training.updates + 1):
                        with self.timer("total"), memory_errors(f"update {number}", _UPDATE_REMEDY):
                            metrics = self.update(number)
                        if first is None:
                            first = metrics["reward/mean"]
                        if tracker is not None:
                            tracker.log(number, metrics, self._timing())
                            if self.code["package_sha256"] not in self.packages():
                                self.made_by.append(self.code)
                        progress.set_postfix(
                            # First, so that what a narrow log cuts off is something else.
                            {"reward": f"{first:.3f} -> {metrics['reward/mean']:.3f}"},
                            ratio=f"{metrics['log_ratio/max_before_first_step']:.1e}",
                            clip=f"{metrics['clip/share']:.2f}",
                            grad=f"{metrics['grad/norm']:.2f}",
                            refresh=False,
                        )
                        progress.update()
                        done = number
                        if number in training.save_at:
                            self._check_weights(number)
                            self._save_weights(self.folder / "updates" / f"{number:06d}")
                        if number % training.checkpoint_every == 0 or number == training.updates:
                            self._save(number, identity, tracker)
                            saved = number
                        self._stop_if_asked(number)
                except Preempted:
                    if done > saved:
                        self._save(done, identity, tracker)
                    raise
            self._save_weights(self.folder / "weights")
        return self.folder / "weights"


def train_run(config: Config, root: Path, experiment: Path, wait: float = 0) -> None:
    """The `train` stage: one arm and seed into ``runs/<arm>-s<seed>``, with its provenance.

    Args:
        config: the run.
        root: repository root.
        experiment: ``results/<experiment>`` with prompts and embeddings.
        wait: seconds to wait for another process that writes this run.

    Raises:
        RunLocked: another process still writes this run.
        OutOfMemory: memory ran out; the message names the settings that lower what is taken.
        Others: see `Trainer` and `Trainer.run`.
    """
    # An update tells of its own.
    with memory_errors(f"{config.run_name}, outside of its updates", _STATE_REMEDY):
        _train(config, root, experiment, wait)


def _train(config: Config, root: Path, experiment: Path, wait: float) -> None:
    trainer = Trainer(config, root, experiment)
    folder = trainer.folder
    if not trainer.distribution.is_main:
        # The main process may be waiting for another job's lock.
        trainer.distribution.meet(wait)
        trainer.run()
        trainer.distribution.leave()
        return

    def outputs() -> list[Path]:
        kept = [
            path for name in ("weights", "updates") for path in sorted((folder / name).rglob("*")) if path.is_file()
        ]
        return [folder / "config.yaml", folder / "metrics.jsonl", *kept]

    with run_lock(folder, wait_seconds=wait):
        trainer.distribution.meet(wait)
        trainer.set_aside_other()
        with record_stage(
            "train",
            folder,
            inputs=[trainer.prompts_path, trainer.embeddings_path, *trainer.weight_inputs.values()],
            outputs=outputs,
            config=config.training_identity(),
            seeds=[config.seed],
            root=root,
        ) as facts:
            trainer.run()
            # In the usual case one code made them all, that of the record.
            if trainer.packages() != [trainer.code["package_sha256"]]:
                facts["updates_made_by"] = trainer.made_by
            trainer.distribution.leave()
