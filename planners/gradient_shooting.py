"""Gradient shooting: descent on the controls, straight through a differentiable model."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError, UnsupportedProblem, require
from mbrl.horizon import problem_of
from mbrl.problem import Box, Plan, Problem
from mbrl.protocols import Dynamics
from mbrl.rollout import evaluate, realize


@dataclass(frozen=True)
class ShootingState:
    """actions: (M, H, nu), the controls to start from."""

    actions: Tensor


@dataclass(frozen=True, kw_only=True)
class GradientShooting:
    """Descends the cost of the whole plan, differentiated back through every step; the best plan on the way counts.

    Controls are normalised by their bounds and projected onto them after each step. Needs dynamics and a cost that
    torch can differentiate: a learned model, or a system; a simulator is not. Particles and risk work as ever, under
    one draw of the noise. Through long horizons gradients explode or vanish, where iLQR's sweep does not.

    Attributes:
        iterations: steps of descent.
        method: "adam", or "lbfgs" with a line search (each step then evaluates the plan several times).
        rate: step size; of Adam as a share of half the action range.
        budget_ms: if set, no step is begun after this many milliseconds. Results then depend on the machine.

    Reference: Kingma & Ba 2015 (Adam); Liu & Nocedal 1989 (L-BFGS).
    """

    iterations: int = 50
    method: Literal["adam", "lbfgs"] = "adam"
    rate: float = 0.05
    budget_ms: float | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 < self.rate < math.inf:
            raise ContractError(
                f"GradientShooting needs iterations ≥ 1 and a finite rate above 0, but got {self.iterations} and "
                f"{self.rate}."
            )
        if self.method not in ("adam", "lbfgs"):
            raise ContractError(f"GradientShooting needs the method adam or lbfgs, but got {self.method!r}.")
        if self.budget_ms is not None and not 0 < self.budget_ms < math.inf:
            raise ContractError(
                f"GradientShooting needs a finite budget_ms above 0, or None, but got {self.budget_ms}."
            )

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        if not isinstance(problem.actions, Box) or not problem.actions.bounded:
            raise UnsupportedProblem(
                "GradientShooting needs Box actions with finite bounds, by which it measures its steps. "
                "Give finite bounds: Box(low, high)."
            )
        if problem.constraints:
            raise UnsupportedProblem(
                "GradientShooting does not hold constraints. Use AugmentedLagrangian, or put them into the cost."
            )
        if not hasattr(problem.dynamics, "realize"):
            require(
                "GradientShooting",
                "dynamics",
                problem.dynamics,
                ("step", "output"),
                "See mbrl.protocols.Dynamics.",
            )

    def init(
        self, problem: Problem[Any, Any, Box], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> ShootingState:
        wanted = (len(x0), problem.horizon, problem.actions.nu)
        if guess is None:
            return ShootingState(problem.actions.center.to(x0).expand(wanted).clone())
        if tuple(guess.actions.shape) != wanted:
            raise ContractError(
                f"GradientShooting needs a guess with actions (M, H, nu) = {wanted}, "
                f"but got {tuple(guess.actions.shape)}."
            )
        return ShootingState(problem.actions.clip(guess.actions.to(x0)))

    def shift(self, state: ShootingState, actions_taken: Tensor, x_now: Tensor) -> ShootingState:
        n, u = actions_taken.shape[-2], state.actions
        return ShootingState(torch.cat([u[:, n:], u[:, -1:].expand(-1, min(n, u.shape[1]), -1)], 1))

    def plan(
        self, problem: Problem[Any, Any, Box], x0: Tensor, state: ShootingState, *, generator: Generator
    ) -> tuple[Plan, ShootingState]:
        if not torch.isfinite(x0).all():
            raise ContractError(
                f"GradientShooting needs finite states, but x0 (M, nx) = {tuple(x0.shape)} holds NaN or inf."
            )
        dynamics, particles = realize(problem, generator=generator)
        self._check_gradient(dynamics, x0, state.actions)
        deadline = math.inf if self.budget_ms is None else time.perf_counter() + 1e-3 * self.budget_ms
        # L-BFGS learns one curvature for all it is given, so each problem is given alone.
        groups = torch.split(torch.arange(len(x0)), len(x0) if self.method == "adam" else 1)
        best, evaluations = state.actions.clone(), 0
        for rows in groups:
            part, start = problem_of(problem, rows), state.actions[rows]
            best[rows], count = self._descend(part, dynamics, particles, x0[rows], start, deadline)
            evaluations += count * len(rows)
        with torch.no_grad():
            fresh, _ = realize(problem, generator=generator)
            final = evaluate(problem, fresh, x0, best[:, None], particles=particles, keep_states=True)
        assert final.states is not None
        # A gradient counts as two rollouts more, forward and back.
        steps = (3 * evaluations + len(x0)) * particles * problem.horizon // len(x0)
        return Plan(best, final.cost[:, 0], final.states[:, 0], info={"model_steps": steps}), ShootingState(
            best
        )

    @torch.enable_grad()
    def _check_gradient(self, dynamics: Dynamics, x0: Tensor, actions: Tensor) -> None:
        """The cost may have a gradient of its own, so the step is asked."""
        u = actions[:, None, 0].detach().clone().requires_grad_()
        if not dynamics.step(x0[:, None], u, 0).requires_grad:
            raise UnsupportedProblem(
                "GradientShooting needs dynamics that torch can differentiate, but no gradient comes through "
                f"{type(dynamics).__name__}. Use ILQR with FiniteDifference(dynamics)."
            )

    def _descend(
        self,
        problem: Problem[Any, Any, Box],
        dynamics: Dynamics,
        particles: int,
        x0: Tensor,
        start: Tensor,
        deadline: float,
    ) -> tuple[Tensor, int]:
        """The cheapest controls (n, H, nu) on the way from `start`, and how many plans were scored for each."""
        center, half = problem.actions.center.to(x0), problem.actions.half_range.to(x0)
        z = ((start - center) / half.clamp(min=1e-12)).clamp(-1, 1).requires_grad_()
        best, lowest, count = start.clone(), x0.new_full((len(x0),), torch.inf), 0
        optimizer: torch.optim.Optimizer = torch.optim.Adam([z], lr=self.rate)
        if self.method == "lbfgs":
            optimizer = torch.optim.LBFGS([z], lr=1.0, max_iter=1, line_search_fn="strong_wolfe")

        @torch.enable_grad()
        def loss() -> Tensor:
            nonlocal best, lowest, count
            u = problem.actions.clip(center + half * z.clamp(-1, 1))
            cost = evaluate(problem, dynamics, x0, u[:, None], particles=particles).cost[:, 0]
            # A row that exploded must not move, nor take others along.
            total = torch.where(torch.isfinite(cost), cost, 0.0).sum()
            (slope,) = torch.autograd.grad(total, z, allow_unused=True)
            z.grad = (
                torch.zeros_like(z) if slope is None else slope.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            )
            better = cost.detach() < lowest
            best = torch.where(better[:, None, None], u.detach(), best)
            lowest = torch.where(better, cost.detach(), lowest)
            count += 1
            return total.detach()

        for _ in range(self.iterations):
            if time.perf_counter() > deadline:
                break
            optimizer.step(loss)  # type: ignore[arg-type]
            with torch.no_grad():
                z.clamp_(-1, 1)
        loss()
        return best, count
