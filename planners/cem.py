"""The cross-entropy method: fit a Gaussian to the best candidates, sample from it, again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.planners.noise import white_noise
from mbrl.planners.sampling import SamplingPlanner, SamplingState, check_range, select_elites


@dataclass(frozen=True)
class CEMState(SamplingState):
    """`solution` is the mean; std: (M, K, nu)."""

    std: Tensor


@dataclass(frozen=True, kw_only=True)
class CEM(SamplingPlanner[CEMState]):
    """The mean of a diagonal Gaussian that was fitted to the elites, iteration after iteration.

    z ~ N(μ, σ²),   μ ← α μ + (1 − α) mean(elites),   σ ← α σ + (1 − α) std(elites)

    Attributes:
        elites: how many of the best candidates the Gaussian is fitted to.
        alpha: momentum α on the old mean and deviation.
        std: initial σ, as a share of half the action range; each control step starts with it.
        min_std: floor of σ.

    Reference: Rubinstein 1999; Chua et al. 2018 (PETS), appendix A.
    Differs: samples outside the bounds are clipped, not redrawn.
    """

    population: int = 33
    iterations: int = 3
    elites: int = 6
    alpha: float = 0.1
    std: float = 0.5
    min_std: float = 0.02

    def __post_init__(self) -> None:
        SamplingPlanner.__post_init__(self)
        check_range(self, 1e-6, 1e3, "std")
        check_range(self, 0.0, 1.0, "alpha", "min_std")
        if not 2 <= self.elites <= self.population:
            raise ContractError(
                f"CEM needs 2 ≤ elites ≤ population, but got {self.elites} and {self.population}."
            )

    def start(self, solution: Tensor, phase: Tensor) -> CEMState:
        return CEMState(solution, phase, torch.full_like(solution, self.std))

    def propose(self, state: CEMState, i: int, last: bool, *, generator: Generator) -> Tensor:
        M, K, nu = state.solution.shape
        noise = white_noise((M, self.population, K, nu), state.solution, generator=generator)
        return state.solution[:, None] + state.std[:, None] * noise

    def update(self, state: CEMState, knots: Tensor, cost: Tensor) -> tuple[CEMState, Tensor]:
        chosen, weights, found = select_elites(knots, cost, self.elites)
        mean = self.alpha * state.solution + (1 - self.alpha) * chosen.mean(1)
        std = self.alpha * state.std + (1 - self.alpha) * chosen.std(1, correction=0)
        keep = ~found[:, None, None]
        return (
            replace(
                state,
                solution=torch.where(keep, state.solution, mean),
                std=torch.where(keep, state.std, std.clamp(min=self.min_std)),
            ),
            weights,
        )

    def advance(self, state: CEMState, move: Callable[[Tensor], Tensor]) -> CEMState:
        return replace(state, solution=move(state.solution), std=torch.full_like(state.std, self.std))
