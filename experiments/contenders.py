"""Planners of one strength: each with as much work as a budget allows, counted in steps of the model or in time.

A contender has one size that its work grows with: the candidates of a sampling planner, the iterations of the others.
Everything else stays at its default, the same for all worlds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError, UnknownName
from mbrl.planners import (
    CEM,
    CMAES,
    DDP,
    FDDP,
    ICEM,
    ILQR,
    MPPI,
    NMPC,
    GradientShooting,
    PredictiveSampling,
    RandomShooting,
    SamplingPlanner,
)
from mbrl.problem import Problem
from mbrl.protocols import Planner


class BudgetTooSmall(ContractError):
    """Not even a handful of candidates, or one iteration, can be had for a budget."""


_ROUNDS = 3
_ICEM_SHARE = 1 + 1 / ICEM.decay + 1 / ICEM.decay**2  # of its first population, in three rounds that shrink


def _cem(n: int) -> CEM:
    each = max(4, n // _ROUNDS)
    return CEM(population=each, iterations=_ROUNDS, elites=max(2, each // 5))


def _icem(n: int) -> ICEM:
    first = max(4, round(n / _ICEM_SHARE))
    return ICEM(population=first, iterations=_ROUNDS, elites=max(2, first // 6))


CONTENDERS: dict[str, Callable[[int], Planner[Any]]] = {
    "random-shooting": lambda n: RandomShooting(population=max(2, n)),
    "cem": _cem,
    "icem": _icem,
    "mppi": lambda n: MPPI(population=max(2, n)),
    "predictive-sampling": lambda n: PredictiveSampling(population=max(2, n)),
    "cma-es": lambda n: CMAES(population=max(4, n // 5), iterations=5),
    "gradient-shooting": lambda n: GradientShooting(iterations=n),
    "ilqr": lambda n: ILQR(iterations=n),
    "fddp": lambda n: FDDP(iterations=n),
    "ddp": lambda n: DDP(iterations=n),
    "nmpc": lambda n: NMPC(iterations=n),
}


def contender(name: str, size: int) -> Planner[Any]:
    """The planner `name` of that size.

    Raises:
        UnknownName: there is no such planner.
    """
    if name not in CONTENDERS:
        raise UnknownName("planner", name, CONTENDERS)
    return CONTENDERS[name](size)


def work(planner: Planner[Any], problem: Problem[Any, Any, Any]) -> float:
    """Steps of the model that one unit of a contender's size may take at most."""
    H = problem.horizon
    if isinstance(planner, SamplingPlanner):
        return H * problem.particles
    if isinstance(planner, GradientShooting):
        return 3 * H * problem.particles
    numbers: int = problem.dynamics.nx + problem.dynamics.nu
    if isinstance(planner, ILQR):
        numbers = getattr(problem.dynamics, "ndx", problem.dynamics.nx) + problem.dynamics.nu
        return H * (numbers + 1 + planner.line_search)
    return H * (numbers + 1)


def size_for(name: str, evaluations: int, problem: Problem[Any, Any, Any]) -> int:
    """The largest size whose plans take at most `evaluations` steps of the model.

    Raises:
        BudgetTooSmall: not even a handful of candidates, or one iteration, can be had for them.
    """
    planner = contender(name, 1)
    per_size, rollout = work(planner, problem), problem.horizon * problem.particles
    before: float = 2 * rollout  # two plans are scored again, or begun with
    if isinstance(planner, GradientShooting):
        before = 4 * rollout  # the gradient after the last step, and the plan once more
    elif isinstance(planner, NMPC):
        before = per_size  # the solver counts its start
    size = int((evaluations - before) / per_size)
    least = 20 if isinstance(planner, SamplingPlanner) else 1
    if size < least:
        raise BudgetTooSmall(
            f"{name} needs at least {int(least * per_size + before):,} steps of the model for a plan of "
            f"{problem.horizon} steps here, but the budget is {evaluations:,}."
        )
    return size


def calibrated(
    name: str, budget_ms: float, problem: Problem[Any, Any, Any], x0: Tensor, *, generator: Generator
) -> int:
    """The largest size whose plans from x0 (M, nx) take at most `budget_ms`, by timing them here and now; at least 1.

    Sizes are doubled until a cold plan takes longer, then halved in between. A planner that converges before is given as
    many iterations as the budget has room for at its pace, but no more than three times those that it took.
    """

    def timed(size: int) -> tuple[float, int]:
        """The median of a plan's seconds, and how many iterations it made, or candidates it had."""
        planner = contender(name, size)
        times = []
        for _ in range(5):
            state = planner.init(problem, x0, generator=generator)
            tic = time.perf_counter()
            plan, _ = planner.plan(problem, x0, state, generator=generator)
            times.append(time.perf_counter() - tic)
        made = None if isinstance(planner, SamplingPlanner) else plan.info.get("iterations")
        return statistics.median(times), size if made is None else int(torch.as_tensor(made).max())

    budget, low = 1e-3 * budget_ms, 1
    timed(4)  # imports and compiles
    seconds, made = timed(low)
    while seconds <= budget:
        if made < low:
            return max(1, min(int(budget / seconds * made), 3 * made))
        high = 2 * low
        seconds, made = timed(high)
        if seconds > budget:
            while high > 1.1 * low + 1:
                middle = (low + high) // 2
                seconds, _ = timed(middle)
                low, high = (middle, high) if seconds <= budget else (low, middle)
            return low
        low = high
    return low
