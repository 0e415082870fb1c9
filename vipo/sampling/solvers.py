"""Deterministic steps of flow matching by higher-order solvers: of whole chains, and of those around a window."""

import math

from torch import Tensor

from vipo.config.sampling import Solver
from vipo.sampling.chain import Chain


class OdeSolver:
    """Steps of the ODE, to be called for one batch from the first step to the last.

    'euler': the chain's own step. 'dpm2': DPM-Solver++ of second order with two steps (2M): Euler's step with x0_hat
    extrapolated along the log-SNR ``log((1 - sigma) / sigma)``; the first and the last step are Euler's. One network
    evaluation a step, as Euler.

    A step that draws noise leads to another path, of which no earlier x0_hat is known: the next deterministic step is
    Euler's, as if the chain began there.

    Source: DPM-Solver++ (arXiv 2211.01095), algorithm 2; DiffusionNFT samples by it. MixGRPO-Flash (arXiv 2507.21802)
    takes it for the steps after its window, beginning anew there too (its public code, 'post'); before the window it
    has Euler's, and it takes fewer steps after it, which is not done here.
    """

    def __init__(self, chain: Chain, solver: Solver) -> None:
        """Before the first step.

        Args:
            chain: of a generator that predicts the velocity; for 'euler', any.
            solver: which.
        """
        self._chain, self._extrapolates = chain, solver == "dpm2"
        self._levels = chain.levels.tolist()
        self._earlier: Tensor | None = None

    def drawn(self) -> None:
        """Tell that the step before the next one drew noise."""
        self._earlier = None

    def step(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """The state after step `step`.

        Args:
            latents: ``(B, C, ...)`` float32, x at the step's level.
            prediction: the velocity there.
            step: in [0, T); between two calls without `drawn` it grows by one.
        """
        if not self._extrapolates:
            return self._chain.ode(latents, prediction, step)
        sigma, after = self._levels[step : step + 2]
        clean = latents - sigma * prediction
        extrapolated = clean
        # Pure noise and clean data have no finite log-SNR.
        if self._earlier is not None and self._levels[step - 1] < 1 and after > 0:
            before = self._levels[step - 1]
            ratio = (_log_snr(after) - _log_snr(sigma)) / (_log_snr(sigma) - _log_snr(before))
            extrapolated = clean + 0.5 * ratio * (clean - self._earlier)
        self._earlier = clean
        return latents + (1 - after / sigma) * (extrapolated - latents)


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
