"""The loop that all sampling planners share. An algorithm is two methods: `propose` and `update`.

Planners search over normalised knots z: −1 and 1 are the bounds of an action, 0 is its middle, so
standard deviations are shares of half the range and no algorithm sees units.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, get_args

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError, UnknownName, UnsupportedProblem, require
from mbrl.planners import spline
from mbrl.problem import Box, Plan, Problem
from mbrl.rollout import Evaluation, evaluate, realize


@dataclass(frozen=True)
class SamplingState:
    """What a sampling planner carries from one plan to the next.

    Attributes:
        solution: (M, K, nu), the normalised knots that the planner would return.
        phase: (M,), steps since the first knot.
    """

    solution: Tensor
    phase: Tensor


S = TypeVar("S", bound=SamplingState)


@dataclass(frozen=True, kw_only=True)
class SamplingPlanner(ABC, Generic[S]):
    """Samples candidate plans, scores them, learns from the scores, again.

    Attributes:
        population: B, candidates per iteration.
        iterations: rounds of sampling and scoring in one plan.
        knot_spacing: steps between control points; 1 makes every action free.
        spline: how actions between control points follow from them.
        budget_ms: if set, iterate until this many milliseconds are used, instead of `iterations`
            times (at least once). Results then depend on the machine.
    """

    population: int = 100
    iterations: int = 1
    knot_spacing: int = 1
    spline: spline.Order = "zero"
    budget_ms: float | None = None

    def __post_init__(self) -> None:
        if self.population < 2 or self.iterations < 1 or self.knot_spacing < 1:
            raise ContractError(
                f"{type(self).__name__} needs population ≥ 2, iterations ≥ 1 and knot_spacing ≥ 1, but got "
                f"{self.population}, {self.iterations} and {self.knot_spacing}."
            )
        if self.spline not in get_args(spline.Order):
            raise UnknownName("spline", self.spline, get_args(spline.Order))
        if self.budget_ms is not None and not 0 < self.budget_ms < math.inf:
            raise ContractError(
                f"{type(self).__name__} needs a finite budget_ms above 0, or None, but got {self.budget_ms}."
            )

    @abstractmethod
    def start(self, solution: Tensor, phase: Tensor) -> S:
        """The state before the first plan, around the knots `solution` (M, K, nu)."""

    @abstractmethod
    def propose(self, state: S, i: int, last: bool, *, generator: Generator) -> Tensor:
        """Candidate knots (M, B, K, nu) of iteration i; they are clipped to [−1, 1] before use."""

    @abstractmethod
    def update(self, state: S, knots: Tensor, cost: Tensor) -> tuple[S, Tensor]:
        """The new state, and the weights (M, B) with which candidates entered it (rows sum to 1 or 0).

        Args:
            knots: (M, B, K, nu), the clipped candidates.
            cost: (M, B), +inf for those that must not be chosen.
        """

    @abstractmethod
    def advance(self, state: S, move: Callable[[Tensor], Tensor]) -> S:
        """The state at the next control step; `move` takes knots (M, ..., K, nu) on in time."""

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        name = type(self).__name__
        if not isinstance(problem.actions, Box):
            raise UnsupportedProblem(
                f"{name} needs Box actions, but {type(problem.actions).__name__} was given. "
                "Use a tree search for discrete actions."
            )
        if not problem.actions.bounded:
            raise UnsupportedProblem(
                f"{name} samples within the action bounds, but low = {problem.actions.low.tolist()}, "
                f"high = {problem.actions.high.tolist()} are not all finite. Give finite bounds: Box(low, high)."
            )
        if problem.constraints:
            raise UnsupportedProblem(
                f"{name} ignores constraints. Use a planner that holds them, or put them into the cost, as a penalty."
            )
        if not hasattr(problem.dynamics, "realize"):
            remedy = "A Dynamics has nx, nu, ny, dt, step(x, u, k) and output(x); see mbrl.protocols."
            require(name, "dynamics", problem.dynamics, ("step", "output"), remedy)

    @torch.no_grad()
    def init(
        self, problem: Problem[Any, Any, Box], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> S:
        if x0.ndim != 2 or x0.shape[1] != problem.dynamics.nx:
            raise ContractError(
                f"{type(self).__name__} needs x0 (M, nx) = (M, {problem.dynamics.nx}), but got {tuple(x0.shape)}."
            )
        M = x0.shape[0]
        phase = torch.zeros(M, dtype=torch.long, device=x0.device)
        if guess is not None:
            box, wanted = problem.actions, (M, problem.horizon, problem.actions.nu)
            if tuple(guess.actions.shape) != wanted:
                raise ContractError(
                    f"{type(self).__name__} needs a guess with actions (M, H, nu) = {wanted}, "
                    f"but got {tuple(guess.actions.shape)}."
                )
            z = (guess.actions.to(x0) - box.center.to(x0)) / box.half_range.to(x0).clamp(min=1e-12)
            return self.start(spline.fit(z.clamp(-1, 1), self.knot_spacing, self.spline), phase)
        K = spline.knot_count(problem.horizon, self.knot_spacing, self.spline)
        return self.start(x0.new_zeros(M, K, problem.actions.nu), phase)

    def shift(self, state: S, actions_taken: Tensor, x_now: Tensor) -> S:
        phase = state.phase + actions_taken.shape[-2]
        passed = phase // self.knot_spacing
        state = replace(state, phase=phase % self.knot_spacing)
        return self.advance(state, lambda knots: spline.advance(knots, passed))

    @torch.no_grad()
    def plan(
        self, problem: Problem[Any, Any, Box], x0: Tensor, state: S, *, generator: Generator
    ) -> tuple[Plan, S]:
        if not torch.isfinite(x0).all():
            raise ContractError(
                f"{type(self).__name__} needs finite states, but x0 (M, nx) = {tuple(x0.shape)} holds NaN or inf."
            )
        low, high = problem.actions.low.to(x0), problem.actions.high.to(x0)
        center, half = (low + high) / 2, (high - low) / 2
        nominal = state.solution
        started = time.perf_counter()

        def actions(knots: Tensor) -> Tensor:
            z = spline.interpolate(knots, state.phase, problem.horizon, self.knot_spacing, self.spline)
            # min and max, since center + half · 1 can round past the bound.
            return torch.minimum(torch.maximum(center + half * z.clamp(-1, 1), low), high)

        def score_twice(solution: Tensor) -> tuple[Tensor, Evaluation]:
            """The actions of the nominal plan and the solution, (M, 2, H, nu), and their scores on a fresh draw."""
            pair = actions(torch.stack([nominal, solution], 1))
            dynamics, particles = realize(problem, generator=generator)
            return pair, evaluate(problem, dynamics, x0, pair, particles=particles, keep_states=True)

        deadline = None
        if self.budget_ms is not None:
            tic = time.perf_counter()
            score_twice(nominal)  # the final scoring takes as long, and must fit in as well
            deadline = started + 1e-3 * self.budget_ms - (time.perf_counter() - tic)
        i, last, evaluations = 0, self.iterations == 1 and deadline is None, 0
        while True:
            tic = time.perf_counter()
            raw = self.propose(state, i, last, generator=generator)
            knots = raw.clamp(-1, 1)
            u = actions(knots)
            dynamics, particles = realize(problem, generator=generator)
            scores = evaluate(problem, dynamics, x0, u, particles=particles)
            state, weights = self.update(state, knots, scores.cost)
            evaluations += particles * u.shape[1] * problem.horizon
            i += 1
            if last:
                break
            if deadline is None:
                last = i + 1 >= self.iterations
            else:
                now = time.perf_counter()
                if now + (now - tic) > deadline:
                    break
                last = now + 2 * (now - tic) > deadline

        # Scored once more on a fresh draw: the cost of the winner of a search is biased by luck.
        pair, final = score_twice(state.solution)
        evaluations += (2 if deadline is None else 4) * particles * problem.horizon
        assert final.states is not None  # kept on request
        spread = (weights[..., None, None] * knots**2).sum(1) - (weights[..., None, None] * knots).sum(1) ** 2
        info: dict[str, Tensor | float | int | str] = {
            # 0 where no candidate was usable
            "effective_samples": weights.sum(-1) / (weights**2).sum(-1).clamp(min=1e-12),
            "elite_spread": spread.clamp(min=0).mean((-1, -2)).sqrt(),
            "clipped": (raw.abs() > 1).to(x0).mean((1, 2, 3)),
            "diverged": scores.diverged.mean(-1),
            "improvement": final.cost[:, 0] - final.cost[:, 1],
            "iterations": i,
            "model_steps": evaluations,
            "candidates": u[:, :: -(-u.shape[1] // 8)].clone(),  # (M, n ≤ 8, H, nu), a few to draw
        }
        plan = Plan(actions=pair[:, 1], cost=final.cost[:, 1], states=final.states[:, 1], info=info)
        return plan, state


def check_range(planner: object, low: float, high: float, *names: str) -> None:
    """Raise ContractError unless each field in `names` lies in [low, high]."""
    for name in names:
        value = getattr(planner, name)
        if not low <= value <= high:  # also for NaN
            raise ContractError(
                f"{type(planner).__name__} needs {name} in [{low:g}, {high:g}], but got {value}."
            )


def best(state: S, knots: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest candidate (M, K, nu), or the state's solution where none is finite; and its weights."""
    low, index = cost.min(-1)
    found = torch.isfinite(low)
    chosen = knots[torch.arange(len(index), device=knots.device), index]
    weights = torch.nn.functional.one_hot(index, cost.shape[-1]).to(knots) * found[:, None]
    return torch.where(found[:, None, None], chosen, state.solution), weights


def select_elites(knots: Tensor, cost: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n cheapest candidates (M, n, K, nu), cheapest first, their weights, and where all n are finite (M,)."""
    low, index = cost.topk(n, dim=-1, largest=False)
    found = torch.isfinite(low).all(-1)
    rows = torch.arange(len(index), device=knots.device)[:, None]
    weights = torch.zeros_like(cost).scatter_(-1, index, 1.0 / n) * found[:, None]
    return knots[rows, index], weights, found
