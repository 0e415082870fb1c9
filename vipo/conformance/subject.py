"""What is compared: one checkpoint, its adapter, and what its stock pipeline makes of a few prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.config.training import LoraConfig
from vipo.conformance.stock import Sampled, sample_stock, stock_pipeline, training_chain
from vipo.generators.base import GeneratorError
from vipo.generators.configured import load_generator, resolve_class
from vipo.generators.pipeline import PipelineGenerator
from vipo.sampling.chain import Chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import Trajectory, rollout
from vipo.sampling.transitions import position_log_prob

PROMPTS = ("a red fox runs", 'two "owls"')

Mode = Literal["frozen", "lora", "full"]


@dataclass(frozen=True)
class Subject:
    """An adapter with its checkpoint.

    Attributes:
        kind: the adapter.
        config: section `generator`, in fp32.
        root: repository root, for relative paths.
        lora: what mode "lora" trains.
        steps: of the compared sample.
        noise: ``(B, *latent_shape)``, one row a prompt.
        conditioning: of the prompts.
        sampled: what the stock pipeline makes of both.
        prompts: texts.
    """

    kind: type[PipelineGenerator]
    config: GeneratorConfig
    root: Path
    lora: LoraConfig
    steps: int
    noise: Tensor
    conditioning: Mapping[str, Tensor]
    sampled: Sampled
    prompts: Sequence[str] = PROMPTS

    def load(self, mode: Mode = "frozen", **changes: object) -> PipelineGenerator:
        """The generator with what `mode` trains, and with `changes` of its configuration.

        Raises:
            GeneratorError: it cannot be loaded.
        """
        config = GeneratorConfig.model_validate(self.config.model_dump() | changes)
        generator = load_generator(config, self.root)
        assert isinstance(generator, PipelineGenerator)
        if mode == "lora":
            generator.add_lora(self.lora, seed=0)
        elif mode == "full":
            generator.train_weights()
        return generator

    def stock(self, **parts: object) -> Any:
        """The stock pipeline, with some `parts` replaced."""
        return stock_pipeline(self.kind, self.config, self.root, **parts)

    def sample(self, pipeline: Any) -> Sampled:
        """What a stock pipeline makes of the prompts and the noise."""
        return sample_stock(pipeline, self.kind, self.config, self.prompts, self.noise, self.steps)


def subject(
    config: GeneratorConfig,
    root: Path,
    *,
    lora: LoraConfig | None = None,
    steps: int = 3,
    prompts: Sequence[str] = PROMPTS,
) -> Subject:
    """Load a checkpoint, encode prompts and let its stock pipeline sample them.

    Args:
        config: section `generator`; compared in fp32.
        root: repository root, for relative paths.
        lora: what mode "lora" trains; None: rank 2, with a scale of 3 that an export must keep.
        steps: of the compared sample.
        prompts: two or more.

    Raises:
        GeneratorError: the adapter is no `PipelineGenerator`, or something cannot be loaded.
    """
    kind = resolve_class(config)
    if not issubclass(kind, PipelineGenerator):
        raise GeneratorError(
            f"generator.family {config.family!r}: only a PipelineGenerator names the stock pipeline to compare with"
        )
    config = config.model_copy(update={"precision": "fp32", "weights": "fp32"})
    device = torch.device(config.device)
    shape = load_generator(config, root).latent_shape
    rows = kind.encode_prompts(config, root, prompts)
    conditioning = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
    noise = keyed_normal([(0, "conformance", i) for i in range(len(prompts))], shape, device)
    sampled = sample_stock(stock_pipeline(kind, config, root), kind, config, prompts, noise, steps)
    return Subject(
        kind, config, root, lora or LoraConfig(rank=2, alpha=6.0), steps, noise, conditioning, sampled, tuple(prompts)
    )


@dataclass(frozen=True)
class Lesson:
    """Sampled chains of a subject, and which of each chain's transitions are learnt from.

    Attributes:
        chain: of four steps, with noise in them.
        path: one a prompt, drawn by the policy as it was.
        transitions: ``(B,)``, one a chain.
    """

    chain: Chain
    path: Trajectory
    transitions: Tensor

    def log_ratios(self, generator: PipelineGenerator, conditioning: Mapping[str, Tensor]) -> Tensor:
        """``logp_new - logp_old`` of the transitions, per position, with its gradient."""
        latents, drawn, old_mean = self.path.at(self.transitions)
        predicted = generator.predict(latents, self.chain.times[self.transitions], conditioning)
        mean, std = self.chain.gaussian(latents, predicted, self.transitions)
        return position_log_prob(drawn, mean, std) - position_log_prob(drawn, old_mean, std)

    def select(self, rows: Sequence[int]) -> "Lesson":
        """Of some chains."""
        chosen = torch.tensor(rows, device=self.transitions.device)
        return Lesson(self.chain, self.path.select(chosen), self.transitions[chosen])


def lesson(generator: PipelineGenerator, compared: Subject) -> Lesson:
    """Roll out what an update learns from."""
    chain = training_chain(generator, 4)
    rows = range(len(compared.noise))
    keys = [(0, "conformance", i) for i in rows]
    path = rollout(generator, compared.conditioning, chain, chain.trainable, keys, keys)
    transitions = torch.tensor([2 * (i % 2) for i in rows], device=generator.device)
    return Lesson(chain, path, transitions)


def loss_of(log_ratio: Tensor) -> Tensor:
    """An objective in which every position counts, and not alike."""
    weights = torch.linspace(-1, 2, log_ratio[0].numel(), device=log_ratio.device).reshape(log_ratio.shape[1:])
    return -(log_ratio.exp() * weights).mean()
