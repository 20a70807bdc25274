"""Random shooting: the best of many uniformly random plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from mbrl.planners.sampling import SamplingPlanner, SamplingState, best


@dataclass(frozen=True)
class RandomShootingState(SamplingState):
    """`lowest` (M,) is the cost of `solution`, so that several iterations keep the best of all."""

    lowest: Tensor


@dataclass(frozen=True, kw_only=True)
class RandomShooting(SamplingPlanner[RandomShootingState]):
    """The best of N independent plans, uniform within the bounds; nothing is carried over.

    Reference: Rao 2009, "A survey of numerical methods for optimal control"; as a baseline,
        Nagabandi et al. 2018, section IV-B.
    """

    def start(self, solution: Tensor, phase: Tensor) -> RandomShootingState:
        return RandomShootingState(solution, phase, solution.new_full((len(solution),), torch.inf))

    def propose(self, state: RandomShootingState, i: int, last: bool, *, generator: Generator) -> Tensor:
        M, K, nu = state.solution.shape
        draw = torch.rand(
            M,
            self.population,
            K,
            nu,
            generator=generator,
            dtype=state.solution.dtype,
            device=state.solution.device,
        )
        return 2 * draw - 1

    def update(
        self, state: RandomShootingState, knots: Tensor, cost: Tensor
    ) -> tuple[RandomShootingState, Tensor]:
        winner, weights = best(state, knots, cost)
        lowest = cost.min(-1).values
        better = lowest < state.lowest
        solution = torch.where(better[:, None, None], winner, state.solution)
        return replace(state, solution=solution, lowest=torch.minimum(lowest, state.lowest)), weights

    def advance(self, state: RandomShootingState, move: Callable[[Tensor], Tensor]) -> RandomShootingState:
        # The old winner stays as the nominal plan, to fall back on and to compare with.
        return replace(state, solution=move(state.solution), lowest=torch.full_like(state.lowest, torch.inf))
