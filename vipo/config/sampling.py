"""Section `sampling`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vipo.config.section import PositiveInt, Section

Solver = Literal["euler", "dpm2"]
"""Of steps without noise (`vipo.sampling.solvers`)."""


class WindowConfig(Section):
    """Steps that draw noise and are trained; all others follow the ODE (MixGRPO, Flow-GRPO-Fast)."""

    size: PositiveInt = Field(description="Stochastic steps of an update, shared by all its samples.")
    move: Literal["fixed", "random", "slide"] = Field(
        "slide", description="Stays at `start`; drawn anew each update; or slides by `stride` every `every` updates."
    )
    start: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="First stochastic step (of a window that slides: at first)."
    )
    within: PositiveInt | None = Field(
        None, description="Steps from the first that the window may lie in; null: all that have a density."
    )
    every: PositiveInt = Field(25, description="Updates between two moves of a window that slides.")
    stride: PositiveInt = Field(1, description="Steps of one move; after the last place it starts again.")
    shared_start: bool = Field(
        False,
        description="Whether the steps before the window are drawn once for a group instead of once for each of its "
        "samples, which begin alike (same_initial_noise).",
    )
    solver: Solver = Field(
        "euler",
        description="Of the steps outside the window: Euler's, or DPM-Solver++ 2M's, whose first step after the window "
        "is Euler's again.",
    )


class SamplingConfig(Section):
    """The chain that produces training samples."""

    steps: Annotated[int, Field(ge=2, le=1000)] = Field(10, description="T, network evaluations per sample.")
    shift: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = Field(
        3.0, description="Time shift s of the sigma schedule: s x / (1 + (s - 1) x); flow matching only."
    )
    transition: Literal["dance", "flow", "cps", "ddim"] = Field(
        "dance",
        description="dance: constant-g reverse SDE (DanceGRPO, ViPO); flow: Flow-GRPO's; cps: coefficients-preserving; "
        "ddim: for networks that predict noise or v.",
    )
    eta: Annotated[float, Field(ge=1e-4, le=100, allow_inf_nan=False)] = Field(
        0.3, description="Noise scale: g (dance), a (flow), eta (cps, ddim: at most 1)."
    )
    same_initial_noise: bool = Field(True, description="One initial noise for all samples of a group.")
    window: WindowConfig | None = Field(None, description="null: every step but the last is stochastic.")
    ode: Solver | None = Field(
        None,
        description="Sample without noise in the steps, by Euler's or DPM-Solver++ 2M's, for an objective that needs "
        "no density; null: by the stochastic chain.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.transition in ("cps", "ddim") and self.eta > 1:
            raise ValueError(f"eta {self.eta} exceeds 1, the most that transition {self.transition!r} takes")
        if self.ode is not None:
            for key, found, fix in (
                ("same_initial_noise", self.same_initial_noise, "all samples of a group would be one; set it to false"),
                ("window", self.window is not None, "no step draws noise; set it to null"),
                ("transition", self.transition == "ddim", "'ddim' is for UNets that predict noise; set ode to null"),
            ):
                if found:
                    raise ValueError(f"{key} does not go with ode {self.ode!r}: {fix}")
        if self.window is not None:
            if self.window.shared_start and not self.same_initial_noise:
                raise ValueError("window.shared_start needs same_initial_noise true: else no two samples begin alike")
            if self.window.solver != "euler" and self.transition == "ddim":
                raise ValueError(
                    f"window.solver {self.window.solver!r} is one of flow matching, transition 'ddim' is for networks "
                    "that predict noise or v; set window.solver to euler"
                )
            start = 0 if self.window.move == "random" else self.window.start
            if start + self.window.size > self.steps - 1:
                raise ValueError(
                    f"window: start {start} + size {self.window.size} exceeds the {self.steps - 1} steps "
                    f"with a density of steps {self.steps} (the last step is deterministic)"
                )
            if self.window.within is not None and not start + self.window.size <= self.window.within < self.steps:
                raise ValueError(
                    f"window.within {self.window.within} must be at least start {start} + size {self.window.size} and "
                    f"at most {self.steps - 1}, the steps with a density of steps {self.steps}"
                )
        return self

    @property
    def solver(self) -> Solver:
        """Of the steps that draw no noise."""
        return self.ode or ("euler" if self.window is None else self.window.solver)
