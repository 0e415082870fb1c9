"""The source `reward`: an advantage goes where the reward looks, as the size of its gradient by the latents."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.config.credit import RewardCreditConfig
from vipo.credit.contrast import normalized
from vipo.credit.source import Context, CreditError, CreditSource, Samples, Weights
from vipo.foreign import foreign
from vipo.generators.base import Generator
from vipo.rewards import Reward, RewardError


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
            return reward(pictures, prompts, metadata)

    return values


class RewardCredit(CreditSource):
    """``W_i(p)`` proportional to ``sqrt(mean over channels of (d r_i / d x0_i(p))^2)``: one decoder's backward pass.

    It is where a small change of the latents changes the reward, not where the reward came from.
    """

    options: RewardCreditConfig
    name: str
    reward: Reward
    generator: Generator

    def set_up(self, context: Context) -> None:
        """Choose the term and try its gradient on one blank sample.

        Raises:
            CreditError: there is no such term, there are several and none is named, or it has no gradient.
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
        self._gradient(blank, [prompt.text], [prompt.metadata])

    def __call__(self, samples: Samples) -> Weights:
        """The weights; of a sample whose reward no position changes, 0 everywhere."""
        found, start = [], 0
        for latents in samples.clean.split(samples.batch or len(samples)):
            own = samples.prompts[start : start + len(latents)]
            gradient = self._gradient(latents, [prompt.text for prompt in own], [prompt.metadata for prompt in own])
            found.append(gradient.double().square().mean(dim=1).sqrt())
            start += len(latents)
        weights = torch.cat(found).nan_to_num(0.0, 0.0, 0.0)
        return Weights(
            normalized(weights**self.options.exponent, self.options.normalize).float(),
            mean_one=self.options.normalize == "mean",
        )

    def _gradient(self, latents: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        reward = differentiated(self.name, self.reward, prompts, metadata)
        return reward_gradient(self.generator, latents, reward, f"credit source 'reward': reward {self.name!r}")[1]
