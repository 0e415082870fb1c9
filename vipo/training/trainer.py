"""The trainer: one readable loop from rollout to checkpoint.

One update: sample ``prompts_per_update x group_size`` trajectories with the current policy, decode, score and
map them, form advantages, then take ``optimizer_steps_per_update`` steps on the clipped surrogate. The order of
samples is ``(optimizer step, prompt, sample)``, so that every step holds the same share of every group, and the
micro-batches of the rollout are those of the update: the same network calls, hence ratios of exactly one.
"""

import contextlib
import logging
import math
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from vipo.config.compose import dump_config
from vipo.config.models import Config, config_hash
from vipo.errors import Preempted, VipoError
from vipo.generators import load_generator
from vipo.generators.base import checkpoint_inputs
from vipo.generators.embeddings import load_embeddings, stack_conditioning
from vipo.objectives import allocate_advantages, clipped_surrogate, group_advantages, weight_maps
from vipo.perception import PerceptualStructuring, load_backbone
from vipo.prompts import Prompt, read_prompts
from vipo.provenance import record_stage, run_lock
from vipo.provenance.files import atomic_file, atomic_folder, file_sha256
from vipo.rewards import RewardError, load_reward, score
from vipo.sampling.noise import Key, keyed_generator
from vipo.sampling.rollout import Trajectory, rollout, transition_log_prob
from vipo.sampling.schedule import sigma_schedule
from vipo.tracking import Timer, Tracker
from vipo.tracking.progress import progress_bar
from vipo.training.checkpoints import (
    Checkpoint,
    load_newest,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    prune_checkpoints,
    save_checkpoint,
    unprefixed,
)

log = logging.getLogger(__name__)


class TrainingError(VipoError):
    """Training cannot start or go on; the message names the cause, the place and what to change."""


@dataclass(frozen=True)
class Sample:
    """One sample of an update."""

    prompt: Prompt
    group: int
    index: int


@dataclass(frozen=True)
class MicroBatch:
    """Samples that share every network call, in the rollout and in the update."""

    rows: tuple[int, ...]
    conditioning: dict[str, Tensor]
    trajectory: Trajectory
    steps: Tensor


def update_prompts(prompts: Sequence[Prompt], seed: int, update: int, count: int) -> list[Prompt]:
    """The prompts of update `update` (from 1): consecutive pieces of a fresh keyed permutation per pass.

    Raises:
        TrainingError: fewer prompts than one update takes.
    """
    per_pass = len(prompts) // count
    if per_pass == 0:
        raise TrainingError(
            f"training.prompts_per_update {count} exceeds the {len(prompts)} training prompts; lower it or add prompts"
        )
    number, piece = divmod(update - 1, per_pass)
    order = torch.randperm(len(prompts), generator=keyed_generator(seed, "prompts", number)).tolist()
    return [prompts[i] for i in order[piece * count : (piece + 1) * count]]


def arrange_samples(prompts: Sequence[Prompt], group_size: int, optimizer_steps: int) -> list[Sample]:
    """All samples of an update in the order ``(optimizer step, prompt, sample)``."""
    share = group_size // optimizer_steps
    return [
        Sample(prompt, group, step * share + i)
        for step in range(optimizer_steps)
        for group, prompt in enumerate(prompts)
        for i in range(share)
    ]


def chosen_transitions(samples: Sequence[Sample], config: Config, update: int) -> Tensor:
    """Which transitions are trained: ``(N, K)`` int64 in [0, T - 2], increasing along K."""
    available, count = config.sampling.steps - 1, config.training.trained_transitions
    choice = config.training.transition_choice
    if choice == "first":
        return torch.arange(count).expand(len(samples), count)
    keys: list[Key] = [
        (config.seed, "transitions", update)
        if choice == "shared"
        else (config.seed, "transitions", update, s.prompt.id, s.index)
        for s in samples
    ]
    return torch.stack(
        [torch.randperm(available, generator=keyed_generator(*key))[:count].sort().values for key in keys]
    )


def map_entropy(maps: Tensor) -> Tensor:
    """Entropy of each map as a distribution over positions, relative to the uniform one: ``(N,)`` in [0, 1]."""
    flat = maps.flatten(1).double()
    share = flat / flat.sum(dim=1, keepdim=True)
    return -(torch.special.xlogy(share, share).sum(dim=1) / math.log(flat.shape[1])).float()


class Trainer:
    """Post-trains one run. `run` is the loop; everything above it is one part of an update."""

    def __init__(self, config: Config, root: Path, experiment: Path) -> None:
        """Load everything and check it before the first computation.

        Args:
            config: the run.
            root: repository root, for relative paths.
            experiment: ``results/<experiment>`` with prompts and embeddings.

        Raises:
            TrainingError, GeneratorError, RewardError, PerceptionError, PromptError: what cannot work.
        """
        if config.is_base:
            raise TrainingError(
                "arm 'base' is the generator as it is: there is nothing to train; choose another arm, or evaluate it"
            )
        torch.set_num_threads(config.training.threads)
        torch.use_deterministic_algorithms(True)
        self.config = config
        self.folder = experiment / "runs" / config.run_name
        self.prompts_path = experiment / "prompts" / "train.jsonl"
        self.embeddings_path = experiment / "embeddings" / "train.safetensors"
        self.accelerator = Accelerator(cpu=config.generator.device == "cpu")
        self.device = torch.device(config.generator.device)
        self.prompts = read_prompts(self.prompts_path)
        update_prompts(self.prompts, config.seed, 1, config.training.prompts_per_update)
        self.generator = load_generator(config.generator, root)
        self.weight_inputs = {
            f"generator {i}": path for i, path in enumerate(checkpoint_inputs(config.generator, root))
        }
        if config.objective.map in ("psm", "inverted") and config.perception.weights is not None:
            self.weight_inputs["perception"] = root / config.perception.weights
        self.embeddings = load_embeddings(self.embeddings_path, self.prompts, self.device)
        self.rewards = {term.name: load_reward(term.name, config.generator.device) for term in config.reward.terms}
        self.structuring = self._load_structuring(root)
        self._try_rewards()
        self.sigmas = sigma_schedule(config.sampling.steps, config.sampling.shift).to(self.device)
        self._prepare_network()
        self._check_resources()
        self.timer = Timer(self.device)
        self.stop_signal: int | None = None

    def _load_structuring(self, root: Path) -> PerceptualStructuring | None:
        if self.config.objective.map not in ("psm", "inverted"):
            return None
        backbone = load_backbone(self.config.perception, self.config.generator.device, root)
        structuring = PerceptualStructuring(backbone, self.config.perception)
        structuring.preflight((self.config.generator.height, self.config.generator.width))
        return structuring

    def _try_rewards(self) -> None:
        blank = torch.zeros(1, 3, self.config.generator.height, self.config.generator.width, device=self.device)
        for name, reward in self.rewards.items():
            score(name, reward, blank, [self.prompts[0].text], [self.prompts[0].metadata])

    def _prepare_network(self) -> None:
        config = self.config
        if config.training.lora is None:
            self.generator.network.requires_grad_(True)
        else:
            self.generator.add_lora(config.training.lora, config.seed)
        network = self.generator.network
        self.trainable = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        training, processes = config.training, self.accelerator.num_processes
        samples = training.prompts_per_update * training.group_size // training.optimizer_steps_per_update
        if (samples // training.micro_batch) % processes:
            raise TrainingError(
                f"the {samples // training.micro_batch} micro-batches of an optimizer step do not divide among "
                f"{processes} processes; change training.micro_batch or the number of processes"
            )
        if processes > 1:
            self.generator.network = self.accelerator.prepare_model(network, evaluation_mode=False).eval()

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
            if 16 * count > total:
                raise TrainingError(
                    f"weights, gradients and AdamW state of {count / 1e9:.1f} G parameters need "
                    f"{16 * count / 2**30:.0f} GiB, the device has {total / 2**30:.0f}; use training.lora"
                )

    # ---- one update -------------------------------------------------------------------------------

    def update(self, number: int) -> dict[str, float]:
        """One update: rollout, scores, maps, advantages, optimizer steps. Returns its metrics."""
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
        result = group_advantages(rewards, weights, groups, objective.std_floor, objective.advantage_clip)
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
        with self.timer("map"):
            maps, map_metrics = self._maps(images)
        advantages = self._local_advantages(result.values, maps, batches)
        with self.timer("learn"):
            return metrics | map_metrics | self._learn(batches, advantages, samples, number)

    def _rollout(self, samples: list[Sample], number: int) -> tuple[list[MicroBatch], list[Tensor]]:
        config, size = self.config, self.config.training.micro_batch
        transitions = chosen_transitions(samples, config, number).to(self.device)
        batches, images = [], []
        for position, start in enumerate(range(0, len(samples), size)):
            if position % self.accelerator.num_processes != self.accelerator.process_index:
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
                trajectory = rollout(self.generator, conditioning, self.sigmas, config.sampling.eta, initial, steps)
            rows = tuple(range(start, start + len(chunk)))
            batches.append(MicroBatch(rows, conditioning, trajectory, transitions[start : start + size]))
            with self.timer("decode"):
                images.append(self.generator.decode(trajectory.clean))
        return batches, images

    def _score(self, samples: list[Sample], batches: list[MicroBatch], images: list[Tensor]) -> dict[str, Tensor]:
        rewards = {name: torch.full((len(samples),), torch.nan) for name in self.rewards}
        for batch, pictures in zip(batches, images, strict=True):
            own = [samples[row] for row in batch.rows]
            for name, reward in self.rewards.items():
                values = score(name, reward, pictures, [s.prompt.text for s in own], [s.prompt.metadata for s in own])
                rewards[name][list(batch.rows)] = values
        if self.accelerator.num_processes > 1:
            rows = torch.tensor([row for batch in batches for row in batch.rows], device=self.device)
            everywhere = self.accelerator.gather(rows).cpu()
            for name, values in rewards.items():
                gathered = self.accelerator.gather(values[rows.cpu()].to(self.device)).cpu()
                rewards[name] = torch.empty_like(values).index_copy(0, everywhere, gathered)
        return rewards

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

    def _maps(self, images: list[Tensor]) -> tuple[list[Tensor] | None, dict[str, float]]:
        kind = self.config.objective.map
        if kind == "none":
            return None, {}
        size = self.generator.grid
        maps, constant, found_maps = [], [], []
        for pictures in images:
            if self.structuring is None:
                maps.append(torch.ones(len(pictures), *size, device=pictures.device))
                constant.append(torch.zeros(len(pictures), dtype=torch.bool, device=pictures.device))
            else:
                found = self.structuring(pictures, size)
                maps.append(weight_maps(kind, found.maps, found.constant, self.config.perception.normalize))
                constant.append(found.constant)
                found_maps.append(found)
        # After the last batch: on an accelerator, reading a flag waits for everything before it.
        for found in found_maps:
            found.check()
        together = self.accelerator.gather(torch.cat(maps)) if self.accelerator.num_processes > 1 else torch.cat(maps)
        flags = (
            self.accelerator.gather(torch.cat(constant)) if self.accelerator.num_processes > 1 else torch.cat(constant)
        )
        return maps, {
            "map/mean": float(together.mean()),
            "map/entropy": float(map_entropy(together).mean()),
            "map/constant_share": float(flags.float().mean()),
        }

    def _local_advantages(self, values: Tensor, maps: list[Tensor] | None, batches: list[MicroBatch]) -> list[Tensor]:
        own = [values[list(batch.rows)].to(self.device) for batch in batches]
        if maps is None:
            return own
        return [allocate_advantages(advantages, weights) for advantages, weights in zip(own, maps, strict=True)]

    def _learn(
        self, batches: list[MicroBatch], advantages: list[Tensor], samples: list[Sample], number: int
    ) -> dict[str, float]:
        training, objective = self.config.training, self.config.objective
        per_step = len(batches) // training.optimizer_steps_per_update
        slots = training.trained_transitions
        losses, norms, largest = [], [], 0.0
        clipped = torch.zeros(self.config.sampling.steps - 1, device=self.device)
        seen = torch.zeros_like(clipped)
        for step in range(training.epochs * training.optimizer_steps_per_update):
            first = (step % training.optimizer_steps_per_update) * per_step
            loss_sum = torch.zeros((), device=self.device)
            for index in range(first, first + per_step):
                batch = batches[index]
                for slot in range(slots):
                    last = index == first + per_step - 1 and slot == slots - 1
                    with contextlib.nullcontext() if last else self.accelerator.no_sync(self.generator.network):
                        which = batch.steps[:, slot]
                        log_prob = transition_log_prob(
                            self.generator,
                            batch.conditioning,
                            batch.trajectory,
                            which,
                            self.sigmas,
                            self.config.sampling.eta,
                        )
                        old = batch.trajectory.log_probs[torch.arange(len(which), device=self.device), which]
                        if step == 0:
                            largest = max(
                                largest, self._check_consistency(log_prob.detach() - old, batch, which, samples, number)
                            )
                        surrogate = clipped_surrogate(
                            log_prob,
                            old,
                            advantages[index],
                            ratio=objective.ratio,
                            side=objective.clip.side,
                            scope=objective.clip.scope,
                            clip_range=objective.clip.range,
                        )
                        loss = surrogate.loss / (per_step * slots)
                        loss.backward()
                    loss_sum += loss.detach()
                    clipped.index_add_(0, which, surrogate.clipped)
                    seen.index_add_(0, which, torch.ones_like(surrogate.clipped))
            norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.config.optimizer.max_grad_norm)
            if not bool(torch.isfinite(norm)):
                texts = sorted({sample.prompt.text for sample in samples})
                raise TrainingError(
                    f"update {number}, optimizer step {step + 1}: the gradient is not finite; the newest checkpoint "
                    f"is the last good state. Prompts of the update: {texts}"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss_sum))
            norms.append(float(norm))
        if self.accelerator.num_processes > 1:
            clipped, seen = self.accelerator.reduce(clipped), self.accelerator.reduce(seen)
        metrics = {
            "loss": sum(losses) / len(losses),
            "grad/norm": sum(norms) / len(norms),
            "log_ratio/max_before_first_step": largest,
            "clip/share": float(clipped.sum() / seen.sum()),
        }
        return metrics | {f"clip/share_t{t}": float(clipped[t] / seen[t]) for t in range(len(seen)) if float(seen[t])}

    def _check_consistency(
        self, log_ratio: Tensor, batch: MicroBatch, steps: Tensor, samples: list[Sample], number: int
    ) -> float:
        largest = float(log_ratio.abs().max())
        tolerance = self.config.training.log_ratio_tolerance
        if largest <= tolerance:
            return largest
        row, *place = (int(i) for i in torch.unravel_index(log_ratio.abs().argmax(), log_ratio.shape))
        sample = samples[batch.rows[row]]
        raise TrainingError(
            f"update {number}: max |log rho| before the first optimizer step is {largest:.3g}, above "
            f"training.log_ratio_tolerance {tolerance:.3g}, at {tuple(place)} of transition {int(steps[row])}, "
            f"sample {sample.index} of {sample.prompt.text!r}. Rollout and update do not evaluate the same network: a "
            "dropout or norm layer in training mode, another dtype or autocast, a kernel that depends on gradients"
        )

    # ---- state ------------------------------------------------------------------------------------

    def identity(self) -> str:
        """Hash of everything that decides the run's result; a checkpoint of another identity is never resumed."""
        inputs = {path.name: file_sha256(path) for path in (self.prompts_path, self.embeddings_path)}
        for name, folder in self.weight_inputs.items():
            files = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
            inputs[name] = config_hash([file_sha256(path) for path in files])
        return config_hash({"config": self.config.training_identity(), "inputs": inputs})

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def set_aside_other(self) -> None:
        """Move a run of another configuration or other inputs out of the folder, so that a fresh one can start."""
        newest = load_newest(self._checkpoints)
        if newest is None or newest.state["identity"] == self.identity():
            return
        superseded = self.folder.parent / ".superseded"
        superseded.mkdir(exist_ok=True)
        name = f"{self.folder.name}-{newest.state['identity'][:12]}"
        aside = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=superseded))
        # What a workflow deleted before it started this process; then the checkpoints last, because they are what
        # tells a process that was killed in between that there is something to set aside.
        for text, file in ((newest.state["metrics"], "metrics.jsonl"), (newest.state["config"], "config.yaml")):
            if not (self.folder / file).is_file():
                (self.folder / file).write_text(text)
        children = [child for child in self.folder.iterdir() if not child.name.startswith(".lock")]
        for child in sorted(children, key=lambda path: path == self._checkpoints):
            shutil.move(child, aside / child.name)
        log.warning(
            "%s was made by another configuration or other inputs: set aside as %s, a fresh run starts",
            self.folder,
            aside,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        weights = unprefixed("network", checkpoint.tensors)
        with torch.no_grad():
            for name, value in self.trainable.items():
                value.copy_(weights[name])
        load_optimizer_tensors(self.optimizer, unprefixed("optimizer", checkpoint.tensors))

    def _save(self, update: int, identity: str, tracker: Tracker | None) -> None:
        if tracker is None:
            return
        with self.timer("checkpoint"):
            self._write_checkpoint(update, identity, tracker)

    def _write_checkpoint(self, update: int, identity: str, tracker: Tracker) -> None:
        tracker.flush()
        tensors = prefixed("network", dict(self.trainable)) | prefixed("optimizer", optimizer_tensors(self.optimizer))
        # The metrics travel with the checkpoint: a workflow that deletes a killed job's outputs loses nothing.
        metrics = (self.folder / "metrics.jsonl").read_text()
        save_checkpoint(
            self._checkpoints,
            update,
            tensors,
            {"identity": identity, "metrics": metrics, "config": dump_config(self.config)},
        )
        prune_checkpoints(self._checkpoints, update, self.config.training.keep_checkpoints)

    def _save_weights(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            wrapped = self.generator.network
            self.generator.network = self.accelerator.unwrap_model(wrapped)
            with atomic_folder(folder) as temporary:
                self.generator.save_network(temporary)
            self.generator.network = wrapped

    def _stop_if_asked(self, finished: int) -> None:
        if self.stop_signal is not None:
            raise Preempted(
                f"stopped by {signal.Signals(self.stop_signal).name} after update {finished}; "
                "start the same command again to go on from there"
            )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def remember(number: int, _frame: FrameType | None) -> None:
            self.stop_signal = number

        previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

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
        main = self.accelerator.is_main_process
        with self._signals():
            identity = self.identity()
            self.accelerator.wait_for_everyone()
            newest = load_newest(self._checkpoints)
            start = 0 if newest is None else newest.update
            if newest is not None:
                self._restore(newest)
                log.info("%s: resumed after update %d of %d", self.config.run_name, start, training.updates)
            if main:
                with atomic_file(self.folder / "metrics.jsonl") as path:
                    path.write_text("" if newest is None else newest.state["metrics"])
                with atomic_file(self.folder / "config.yaml") as path:
                    path.write_text(dump_config(self.config))
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
                try:
                    for number in range(start + 1, training.updates + 1):
                        with self.timer("total"):
                            metrics = self.update(number)
                        if tracker is not None:
                            tracker.log(number, metrics, self._timing())
                        progress.set_postfix(
                            reward=f"{metrics['reward/mean']:.4f}",
                            ratio=f"{metrics['log_ratio/max_before_first_step']:.1e}",
                            clip=f"{metrics['clip/share']:.2f}",
                            grad=f"{metrics['grad/norm']:.2f}",
                            refresh=False,
                        )
                        progress.update()
                        done = number
                        if number in training.save_at:
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


def train_run(config: Config, root: Path, experiment: Path) -> None:
    """The `train` stage: one arm and seed into ``runs/<arm>-s<seed>``, with its provenance.

    Raises:
        RunLocked: another process writes this run.
        Others: see `Trainer` and `Trainer.run`.
    """
    trainer = Trainer(config, root, experiment)
    folder = trainer.folder
    if not trainer.accelerator.is_main_process:
        trainer.run()
        return

    def outputs() -> list[Path]:
        kept = [
            path for name in ("weights", "updates") for path in sorted((folder / name).rglob("*")) if path.is_file()
        ]
        return [folder / "config.yaml", folder / "metrics.jsonl", *kept]

    with run_lock(folder):
        trainer.set_aside_other()
        with record_stage(
            "train",
            folder,
            inputs=[trainer.prompts_path, trainer.embeddings_path, *trainer.weight_inputs.values()],
            outputs=outputs,
            config=config.training_identity(),
            seeds=[config.seed],
            root=root,
        ):
            trainer.run()
