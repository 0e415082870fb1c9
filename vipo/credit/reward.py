"""The source `reward`: an advantage goes where the reward looks: by its gradient, by occlusion, or by its own map."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.config.credit import RewardCreditConfig
from vipo.credit.contrast import normalized
from vipo.credit.costs import Costs
from vipo.credit.occlusion import occlusion_map
from vipo.credit.source import Context, CreditError, CreditSource, Samples, Weights
from vipo.foreign import foreign
from vipo.generators.base import Generator
from vipo.perception.allocator import resize
from vipo.perception.temporal import average_groups
from vipo.rewards import Reward, RewardError, Scored, in_use, score, score_where


def reward_gradient(
    generator: Generator,
    clean: Tensor,
    reward: Callable[[Tensor], Tensor],
    called: str,
) -> tuple[Tensor, Tensor]:
    """A reward of decoded latents, and its gradient by them.

    Args:
        generator: whose decoder makes the pictures.
        clean: ``(B, C, [T,] H, W)``.
        reward: of pictures ``(B, ...)``, ``(B,)``.
        called: names the reward in messages.

    Returns:
        ``(B,)`` without gradient, and each sample's gradient by its own latents, like `clean`.

    Raises:
        CreditError: the reward, or the decoder, hands no gradient on.
    """
    with torch.enable_grad():
        latents = clean.detach().requires_grad_(True)
        pictures = generator.pictures(latents, gradient=True)
        if not pictures.requires_grad:
            raise CreditError(
                f"generator.family {generator.config.family!r}: its decode cuts the gradient (torch.no_grad), so the "
                "gradient of the reward is not known"
            )
        values = reward(pictures)
        if not (isinstance(values, Tensor) and values.requires_grad):
            raise CreditError(f"{called} has no gradient by the picture")
        (gradient,) = torch.autograd.grad(values.sum(), latents)
    return values.detach(), gradient


def differentiated(
    name: str, reward: Reward, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Callable[[Tensor], Tensor]:
    """A reward of pictures alone, its gradient kept; others' code runs behind `vipo.foreign`."""

    def values(pictures: Tensor) -> Tensor:
        with foreign(RewardError, f"reward {name!r}", name):
            found = reward(pictures, prompts, metadata)
            return found.scores if isinstance(found, Scored) else found

    return values


class RewardCredit(CreditSource):
    """Where a reward looks.

    By its gradient, ``W_i(p)`` is proportional to ``sqrt(mean over channels of (d r_i / d x0_i(p))^2)``: one decoder's
    backward pass. It is where a small change of the latents changes the reward, not where the reward came from. By
    occlusion (`vipo.credit.occlusion`), it is by how much the reward changes where a patch of the picture is blurred.
    By the reward's own map of where, that map, resized to the latents' grid and averaged over each latent frame's
    frames.
    """

    options: RewardCreditConfig
    name: str
    reward: Reward
    generator: Generator

    def set_up(self, context: Context) -> None:
        """Choose the term and try on one blank sample what is read of it.

        Raises:
            CreditError: there is no such term, there are several and none is named, it has no gradient, or it does
                not say where.
        """
        term = self.options.term
        if (term is None and len(context.rewards) > 1) or (term is not None and term not in context.rewards):
            raise CreditError(
                f"credit source 'reward': set term to one of reward.terms, {', '.join(context.rewards)} (it is {term})"
            )
        self.name = next(iter(context.rewards)) if term is None else term
        self.reward, self.generator = context.rewards[self.name], context.generator
        prompt = context.prompts[0]
        blank = torch.zeros(1, *self.generator.latent_shape, device=self.generator.device)
        with in_use(self.reward):
            if self.options.reads == "where":
                self._where(self.generator.pictures(blank), [prompt.text], [prompt.metadata])
            elif self.options.reads == "occlusion":
                self._check_patches()
            else:
                self._gradient(blank, [prompt.text], [prompt.metadata])

    def __call__(self, samples: Samples) -> Weights:
        """The weights. Of a sample whose reward no position changes, 0 everywhere; of one that the reward says nothing
        of, 1."""
        with in_use(self.reward):
            if self.options.reads == "where":
                return self._told(samples)
            if self.options.reads == "occlusion":
                return self._normalized(self._occluded(samples), Costs(reward_calls=1 + self.options.patches**2))
            return self._normalized(self._sizes(samples), Costs(decodes=1, reward_calls=1))

    def _told(self, samples: Samples) -> Weights:
        found = []
        for pictures, texts, metadata in _with_prompts(samples, samples.pictures):
            maps = self._where(pictures, texts, metadata)
            frames = maps if maps.ndim == 4 else maps[:, None]
            resized = resize(frames.flatten(0, 1), samples.grid).unflatten(0, frames.shape[:2])
            groups = samples.frame_groups
            found.append(resized[:, 0] if groups is None else average_groups(resized, groups))
        values = torch.cat(found).double()
        silent = values.flatten(1).amax(dim=1) == 0
        weights = normalized(values**self.options.exponent, self.options.normalize).float()
        weights[silent] = 1.0
        return Weights(weights, constant=silent, mean_one=self.options.normalize == "mean", costs=Costs(reward_calls=1))

    def _where(self, pictures: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        where = score_where(self.name, self.reward, pictures, prompts, metadata).where
        if where is None:
            raise CreditError(
                f"credit source 'reward': reward {self.name!r} does not say where; set reads to gradient, or take a "
                "reward that does, such as object_redness or ocr"
            )
        return where

    def _check_patches(self) -> None:
        height, width = self.generator.config.sample_shape[-2:]
        if (patches := self.options.patches) > min(height, width):
            raise CreditError(f"credit source 'reward': {patches} patches a side of {height}x{width} pixels; lower it")

    def _occluded(self, samples: Samples) -> Tensor:
        found = []
        for pictures, texts, metadata in _with_prompts(samples, samples.pictures):
            reward = functools.partial(score, self.name, self.reward, prompts=texts, metadata=metadata)
            found.append(occlusion_map(reward, pictures, self.options.patches))
        maps = resize(torch.cat(found), samples.grid)
        # Of a video, one map for all its frames.
        frames = samples.positions[:-2]
        return maps.reshape(len(maps), *[1] * len(frames), *samples.grid).expand(-1, *samples.positions)

    def _sizes(self, samples: Samples) -> Tensor:
        pieces = _with_prompts(samples, samples.clean)
        return torch.cat([self._gradient(*piece).double().square().mean(dim=1).sqrt() for piece in pieces])

    def _normalized(self, sizes: Tensor, costs: Costs) -> Weights:
        weights = sizes.nan_to_num(0.0, 0.0, 0.0)
        return Weights(
            normalized(weights**self.options.exponent, self.options.normalize).float(),
            mean_one=self.options.normalize == "mean",
            costs=costs,
        )

    def _gradient(self, latents: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        reward = differentiated(self.name, self.reward, prompts, metadata)
        return reward_gradient(self.generator, latents, reward, f"credit source 'reward': reward {self.name!r}")[1]


def _with_prompts(samples: Samples, values: Tensor) -> Iterator[tuple[Tensor, list[str], list[Mapping[str, Any]]]]:
    """`values` ``(n, ...)`` in pieces of `samples.batch`, each with the texts and metadata of its prompts."""
    start = 0
    for piece in values.split(samples.batch or len(samples)):
        own = samples.prompts[start : start + len(piece)]
        yield piece, [prompt.text for prompt in own], [prompt.metadata for prompt in own]
        start += len(piece)
