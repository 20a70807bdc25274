"""Random shooting: the best of many uniformly random plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from mbrl.planners.sampling import SamplingPlanner, SamplingState, best


@dataclass(frozen=True, kw_only=True)
class RandomShooting(SamplingPlanner[SamplingState]):
    """The best of N independent plans, uniform within the bounds; nothing is carried over.

    With several iterations the best plan so far stands again as candidate 0, on the new draw of the
    model. The winner of the last control step is only what plans are compared with and fall back on.

    Reference: Rao 2009, "A survey of numerical methods for optimal control"; as a baseline,
        Nagabandi et al. 2018, section IV-B.
    """

    def start(self, solution: Tensor, phase: Tensor) -> SamplingState:
        return SamplingState(solution, phase)

    def propose(self, state: SamplingState, i: int, last: bool, *, generator: Generator) -> Tensor:
        like = state.solution
        M, K, nu = like.shape
        shape = (M, self.population, K, nu)
        knots = 2 * torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) - 1
        if i > 0:
            knots[:, 0] = like
        return knots

    def update(self, state: SamplingState, knots: Tensor, cost: Tensor) -> tuple[SamplingState, Tensor]:
        solution, weights = best(state, knots, cost)
        return replace(state, solution=solution), weights

    def advance(self, state: SamplingState, move: Callable[[Tensor], Tensor]) -> SamplingState:
        return replace(state, solution=move(state.solution))
