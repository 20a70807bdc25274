"""Predictive sampling: keep the nominal plan unless a random perturbation of it is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from mbrl.planners.noise import white_noise
from mbrl.planners.sampling import SamplingPlanner, SamplingState, best, check_range
from mbrl.planners.spline import Order


@dataclass(frozen=True, kw_only=True)
class PredictiveSampling(SamplingPlanner[SamplingState]):
    """The best of the nominal plan and N − 1 Gaussian perturbations of its knots.

    The nominal plan is candidate 0, so on a deterministic model a plan is never worse than the one
    before it.

    Attributes:
        std: of the perturbation, as a share of half the action range.
        wide_share: share of the candidates that is perturbed with `wide_std` instead.
        wide_std: the second, larger standard deviation.

    Reference: Howell et al. 2022, "Predictive sampling: real-time behaviour synthesis with MuJoCo",
        algorithm 2; the mixture of two deviations follows the authors' software.
    """

    knot_spacing: int = 2
    spline: Order = "linear"
    std: float = 0.3
    wide_share: float = 0.2
    wide_std: float = 0.8

    def __post_init__(self) -> None:
        SamplingPlanner.__post_init__(self)
        check_range(self, 1e-6, 1e3, "std", "wide_std")
        check_range(self, 0.0, 1.0, "wide_share")

    def start(self, solution: Tensor, phase: Tensor) -> SamplingState:
        return SamplingState(solution, phase)

    def propose(self, state: SamplingState, i: int, last: bool, *, generator: Generator) -> Tensor:
        M, K, nu = state.solution.shape
        noise = white_noise((M, self.population, K, nu), state.solution, generator=generator)
        wide = int(self.wide_share * self.population)
        noise[:, : self.population - wide] *= self.std
        noise[:, self.population - wide :] *= self.wide_std
        noise[:, 0] = 0.0
        return state.solution[:, None] + noise

    def update(self, state: SamplingState, knots: Tensor, cost: Tensor) -> tuple[SamplingState, Tensor]:
        solution, weights = best(state, knots, cost)
        return replace(state, solution=solution), weights

    def advance(self, state: SamplingState, move: Callable[[Tensor], Tensor]) -> SamplingState:
        return replace(state, solution=move(state.solution))
