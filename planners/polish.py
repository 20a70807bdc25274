"""Two planners in a row: one that finds the valley, one that finds its floor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.mpc import where
from mbrl.planners.icem import ICEM
from mbrl.planners.ilqr import ILQR
from mbrl.problem import Plan, Problem
from mbrl.protocols import Planner


@dataclass(frozen=True, kw_only=True)
class Polish:
    """Refines the winner of a search, such as `Polish(planner=ICEM(), by=ILQR(iterations=10))`.

    The better of both plans is kept, and the search goes on around it at the next control step. `info` is of the
    refinement, with "searched" (M,), the cost before it.

    Attributes:
        planner: searches; its state is the state.
        by: refines, from the plan found.
    """

    planner: Planner[Any] = field(default_factory=ICEM)
    by: Planner[Any] = field(default_factory=ILQR)

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        self.planner.check(problem)
        self.by.check(problem)

    def init(
        self, problem: Problem[Any, Any, Any], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> Any:
        return self.planner.init(problem, x0, generator=generator, guess=guess)

    def shift(self, state: Any, actions_taken: Tensor, x_now: Tensor) -> Any:
        return self.planner.shift(state, actions_taken, x_now)

    def plan(
        self, problem: Problem[Any, Any, Any], x0: Tensor, state: Any, *, generator: Generator
    ) -> tuple[Plan, Any]:
        found, searched = self.planner.plan(problem, x0, state, generator=generator)
        start = self.by.init(problem, x0, generator=generator, guess=found)
        refined, _ = self.by.plan(problem, x0, start, generator=generator)
        better = refined.cost < found.cost
        actions = torch.where(better[:, None, None], refined.actions, found.actions)
        states = None
        if refined.states is not None and found.states is not None:
            states = torch.where(better[:, None, None], refined.states, found.states)
        K = None if refined.K is None else torch.where(better[:, None, None, None], refined.K, 0.0)
        plan = Plan(
            actions=actions,
            cost=torch.where(better, refined.cost, found.cost),
            states=states,
            K=K,
            info={**refined.info, "searched": found.cost},
        )
        around = self.planner.init(problem, x0, generator=generator, guess=plan)
        return plan, where(better, around, searched)
