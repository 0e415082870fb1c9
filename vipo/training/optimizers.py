"""The optimizers of a run, and what each keeps of a parameter."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vipo.config.optimizer import AdamW8bitConfig, AdamWConfig, NormalisedConfig, OptimizerConfig, SgdConfig
from vipo.training.errors import TrainingError


def load_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a run, before its first step.

    Args:
        config: section `optimizer`.
        parameters: that are trained.

    Raises:
        TrainingError: its library is not installed.
    """
    match config:
        case AdamW8bitConfig():
            try:
                from vipo.training.eight_bit import AdamW8bit
            except ImportError as error:
                raise TrainingError(
                    f"optimizer.name 'adamw_8bit' needs bitsandbytes ({error}): pip install 'vipo[adamw_8bit]' "
                    "(after 'make env': uv pip install bitsandbytes), or choose another optimizer"
                ) from error
            return AdamW8bit(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        case AdamWConfig():
            return torch.optim.AdamW(
                parameters,
                lr=config.learning_rate,
                betas=config.betas,
                weight_decay=config.weight_decay,
                fused=config.fused,
                foreach=None if config.fused else True,
            )
        case SgdConfig():
            return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum)
        case NormalisedConfig():
            return Normalised(parameters, lr=config.learning_rate, momentum=config.momentum)


def learning_rate(config: OptimizerConfig, update: int, updates: int) -> float:
    """The rate of an update, from 1: a function of its number alone, so that a resume needs no state of it.

    Rising linearly in the warm-up; the cosine is that of Loshchilov and Hutter (arXiv:1608.03983) without restarts.
    """
    warmup = config.warmup_updates
    if update <= warmup:
        return config.learning_rate * update / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * (update - warmup - 1) / (updates - warmup))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the optimizer's steps have this rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Normalised(torch.optim.Optimizer):
    """Steps of one length along a running mean of the gradient.

    ``m <- momentum m + (1 - momentum) g``, from ``m = 0``, and ``w <- w - lr m / |m|``, where ``|m|`` is the norm over
    all parameters together: normalised SGD with momentum of Cutkosky and Mehta, "Momentum Improves Normalized SGD"
    (2020, arXiv:2002.03305). With momentum 0 it is the gradient's direction at a fixed length. Where ``m`` is 0 there
    is no step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one; a parameter without a gradient stays, and is no part of the norm."""
        means: list[Tensor] = []
        moved: list[tuple[Tensor, float]] = []
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    state = self.state[value]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(value)
                    means.append(state["momentum_buffer"].lerp_(value.grad, 1 - group["momentum"]))
                    moved.append((value, group["lr"]))
        norm = torch.nn.utils.get_total_norm(means)
        length = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        for (value, rate), mean in zip(moved, means, strict=True) if length else ():
            value.add_(mean, alpha=-rate / length)


def state_like(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    """Tensors of the types and shapes of what an optimizer keeps of a parameter, by entry."""
    match optimizer:
        case torch.optim.AdamW():
            return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        case torch.optim.SGD():
            return {"momentum_buffer": parameter} if optimizer.defaults["momentum"] else {}
        case Normalised():
            return {"momentum_buffer": parameter}
        case _:
            # Of one whose library may not be there.
            own: Any = optimizer
            found: Mapping[str, Tensor] = own.state_like(parameter)
            return found
