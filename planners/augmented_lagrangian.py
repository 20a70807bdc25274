"""State constraints: an augmented Lagrangian around iLQR or DDP."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError, UnsupportedProblem
from mbrl.horizon import problem_of
from mbrl.planners.ilqr import ILQR, ILQRState
from mbrl.problem import Box, Constraint, Plan, Problem
from mbrl.rollout import evaluate


@dataclass(frozen=True)
class LagrangianState:
    """What is carried from one plan to the next.

    Attributes:
        actions, states, K, damping, growth: of the inner planner, see `ILQRState`.
        multipliers: (M, H+1, nc), of the path constraints in the first H rows, of the terminal ones in the last.
        penalty: (M,), μ.
    """

    actions: Tensor
    states: Tensor
    K: Tensor
    damping: Tensor
    growth: Tensor
    multipliers: Tensor
    penalty: Tensor

    @property
    def inner(self) -> ILQRState:
        return ILQRState(self.actions, self.states, self.K, self.damping, self.growth)


@dataclass(frozen=True, kw_only=True)
class AugmentedLagrangian:
    """Solves a problem with `constraints` as a sequence of problems without, each by `inner`.

    Each constraint g enters the cost as ψ(g) = max over t of t g − (t − λ)² / 2μ, with t ≥ 0 for g ≤ 0, any t for
    g = 0, and |t| at most the weight of a soft constraint, whose exact penalty this is. After each round λ becomes the
    maximiser t, and μ grows where the violation has not fallen to a quarter.

    Attributes:
        inner: solves the rounds; its own iterations are per round.
        rounds: at most.
        penalty: μ of the first round, in units of cost / constraint².
        growth, most: factor by which μ grows, and its largest value.
        tolerance: done where no multiplier moves by more than this times μ, so no active constraint is violated by
            more, in its own units.

    `Plan.cost` is the cost alone; `info["violation"]` (M,) is the largest violation of a hard constraint.

    Reference: Howell, Jackson & Manchester 2019, "ALTRO: a fast solver for constrained trajectory optimization";
        Nocedal & Wright 2006, section 17.4.
    """

    inner: ILQR = field(default_factory=ILQR)
    rounds: int = 20
    penalty: float = 1.0
    growth: float = 10.0
    most: float = 1e8
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.penalty > 0 or not self.growth > 1 or not self.most >= self.penalty:
            raise ContractError(
                "AugmentedLagrangian needs rounds ≥ 1, 0 < penalty ≤ most and growth > 1, but got "
                f"{self.rounds}, {self.penalty}, {self.most} and {self.growth}."
            )
        if not self.tolerance > 0:
            raise ContractError(f"AugmentedLagrangian needs a tolerance above 0, but got {self.tolerance}.")

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        if problem.terminated is not None and any(c.at == "terminal" for c in problem.constraints):
            raise UnsupportedProblem(
                "AugmentedLagrangian cannot hold terminal constraints on an episode that may end before its horizon. "
                "Leave out `terminated`, or put the end into the cost."
            )
        self.inner.check(dataclasses.replace(problem, constraints=()))

    def init(
        self, problem: Problem[Any, Any, Box], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> LagrangianState:
        inner = self.inner.init(problem, x0, generator=generator, guess=guess)
        M, H, _ = inner.actions.shape
        n = sum(_sizes(problem, x0.double()))
        zeros = inner.actions.new_zeros(M, H + 1, n)
        return _join(inner, zeros, inner.actions.new_full((M,), self.penalty))

    def shift(self, state: LagrangianState, actions_taken: Tensor, x_now: Tensor) -> LagrangianState:
        n = actions_taken.shape[-2]
        rows, path, end = state.multipliers.shape[1] - 1, state.multipliers[:, :-1], state.multipliers[:, -1:]
        later = torch.cat([path[:, n:], path[:, -1:].expand(-1, min(n, rows), -1)], 1)
        return _join(
            self.inner.shift(state.inner, actions_taken, x_now), torch.cat([later, end], 1), state.penalty
        )

    @torch.no_grad()
    def plan(
        self, problem: Problem[Any, Any, Box], x0: Tensor, state: LagrangianState, *, generator: Generator
    ) -> tuple[Plan, LagrangianState]:
        x, M = x0.double(), len(x0)
        inner = {f.name: getattr(state.inner, f.name).clone() for f in dataclasses.fields(ILQRState)}
        multipliers, penalty = state.multipliers.clone(), state.penalty.clone()
        cost = WithMultipliers(problem.cost, problem.constraints, _sizes(problem, x), _np(problem))
        worst = x.new_full((M,), torch.inf)
        status, iterations, rounds = (torch.zeros(M, dtype=torch.long) for _ in range(3))
        todo = torch.arange(M)
        for _ in range(self.rounds):
            part = problem_of(problem, todo)
            own = [] if part.params is None else [part.params.to(x).expand(len(todo), -1, -1)]
            mu = penalty[todo, None, None]
            params = torch.cat([*own, multipliers[todo], mu.expand(-1, multipliers.shape[1], 1)], -1)
            augmented = dataclasses.replace(part, cost=cost, params=params, constraints=())
            # Only the multipliers have changed: the trajectory and the damping go on.
            start = ILQRState(**{name: value[todo] for name, value in inner.items()})
            plan, after = self.inner.plan(augmented, x[todo], start, generator=generator)
            for name, value in inner.items():
                value[todo] = getattr(after, name)
            done, count = plan.info["status"], plan.info["iterations"]
            assert isinstance(done, Tensor) and isinstance(count, Tensor)
            status[todo], iterations[todo], rounds[todo] = done, iterations[todo] + count, rounds[todo] + 1
            g = violations(part, after.states, after.actions)
            now = cost.worst(g)
            slow = now > 0.25 * worst[todo]
            worst[todo] = now
            t = cost.maximiser(g, multipliers[todo], mu)
            # Of an active constraint this is its violation; it also sees multipliers that should have fallen to 0.
            change = ((t - multipliers[todo]).abs() / mu).flatten(1)
            going = ~(change <= self.tolerance).all(1)
            multipliers[todo] = torch.where(torch.isfinite(t), t, multipliers[todo])
            penalty[todo] = torch.where(
                slow, (penalty[todo] * self.growth).clamp(max=self.most), penalty[todo]
            )
            todo = todo[going & torch.isfinite(plan.cost)]
            if not len(todo):
                break
        free = dataclasses.replace(problem, constraints=())
        actions = inner["actions"]
        low, high = problem.actions.low.to(x0), problem.actions.high.to(x0)
        plan = Plan(
            actions=torch.maximum(torch.minimum(actions.to(x0), high), low),
            cost=evaluate(free, problem.dynamics, x, actions[:, None]).cost[:, 0].to(x0),
            states=torch.cat([x0[:, None], inner["states"][:, 1:].to(x0)], 1),
            K=inner["K"].to(x0),
            info={
                "status": status,
                "iterations": iterations,
                "rounds": rounds,
                "violation": worst,
                "penalty": penalty,
                "damping": inner["damping"],
            },
        )
        # The next plan starts from these multipliers; a penalty that only the last digits needed would blind it.
        return plan, _join(ILQRState(**inner), multipliers, torch.full_like(penalty, self.penalty))


@dataclass(frozen=True)
class WithMultipliers:
    """A cost with ψ of every constraint. Its parameters at step k are (p, λ, μ).

    Attributes:
        sizes: how many numbers each constraint has.
        np: how many parameters the cost itself takes.
    """

    cost: Any
    constraints: tuple[Constraint, ...]
    sizes: tuple[int, ...]
    np: int

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        assert p is not None
        own = p[..., : self.np] if self.np else None
        paid: Tensor = self.cost.stage(y, u, y_next, k, own)
        return paid + self._penalty("path", y, u, k, own, p)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        assert p is not None
        own = p[..., : self.np] if self.np else None
        paid: Tensor = self.cost.terminal(y, own)
        return paid + self._penalty("terminal", y, None, None, own, p)

    def _penalty(
        self, at: str, y: Tensor, u: Tensor | None, k: int | None, own: Tensor | None, p: Tensor
    ) -> Tensor:
        total, start = torch.zeros_like(y[..., 0]), self.np
        for constraint, size in zip(self.constraints, self.sizes, strict=True):
            if constraint.at == at:
                g = constraint.fun(y, u, k, own)
                multiplier, mu = p[..., start : start + size], p[..., -1:]
                t = _clip(constraint, multiplier + mu * g)
                total = total + (t * g - (t - multiplier) ** 2 / (2 * mu)).sum(-1)
            start += size
        return total

    def maximiser(self, g: Tensor, multipliers: Tensor, penalty: Tensor) -> Tensor:
        """t (M, H+1, nc) of g (M, H+1, nc); g is NaN where a constraint is not asked, and t is 0 there."""
        parts = torch.split(multipliers + penalty * g, list(self.sizes), -1)
        clipped = [_clip(c, part) for c, part in zip(self.constraints, parts, strict=True)]
        return torch.cat(clipped, -1).nan_to_num(nan=0.0) if clipped else multipliers

    def worst(self, g: Tensor) -> Tensor:
        """The largest violation (M,) of a hard constraint."""
        worst = torch.zeros_like(g[:, 0, :1].sum(-1))
        for constraint, part in zip(self.constraints, torch.split(g, list(self.sizes), -1), strict=True):
            if constraint.soft is None:
                v = part.abs() if constraint.kind == "eq" else part.clamp(min=0.0)
                worst = torch.maximum(worst, v.nan_to_num(nan=0.0).amax((1, 2)))
        return worst


def violations(problem: Problem[Any, Any, Any], states: Tensor, actions: Tensor) -> Tensor:
    """g (M, H+1, nc) of every constraint along states (M, H+1, nx); NaN where it is not asked."""
    y = problem.dynamics.output(states)
    M, H, _ = actions.shape
    parts = []
    for constraint, size in zip(problem.constraints, _sizes(problem, states[:, 0]), strict=True):
        part = y.new_full((M, H + 1, size), torch.nan)
        p = problem.params
        if constraint.at == "path":
            for k in range(H):
                p_k = None if p is None else (p[k] if p.ndim == 2 else p[:, k])
                part[:, k] = constraint.fun(y[:, k], actions[:, k], k, p_k)
        else:
            p_H = None if p is None else (p[H] if p.ndim == 2 else p[:, H])
            part[:, H] = constraint.fun(y[:, H], None, None, p_H)
        parts.append(part)
    return torch.cat(parts, -1) if parts else y.new_zeros(M, H + 1, 0)


def _clip(constraint: Constraint, t: Tensor) -> Tensor:
    most = torch.inf if constraint.soft is None else constraint.soft
    return t.clamp(min=0.0 if constraint.kind == "le" else -most, max=most)


def _sizes(problem: Problem[Any, Any, Any], x: Tensor) -> tuple[int, ...]:
    """How many numbers each constraint has at x (M, nx)."""
    y = problem.dynamics.output(x)
    u = y.new_zeros(len(y), problem.actions.nu)
    p = problem.params
    p_0 = None if p is None else (p[0] if p.ndim == 2 else p[:, 0])
    sizes = []
    for constraint in problem.constraints:
        path = constraint.at == "path"
        g = constraint.fun(y, u if path else None, 0 if path else None, p_0)
        if not isinstance(g, Tensor) or g.ndim != 2 or len(g) != len(y):
            given = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
            raise ContractError(
                f"A constraint must return (..., n) of y (..., ny), here ({len(y)}, n), but it returned {given}."
            )
        sizes.append(int(g.shape[-1]))
    return tuple(sizes)


def _np(problem: Problem[Any, Any, Any]) -> int:
    return 0 if problem.params is None else problem.params.shape[-1]


def _join(inner: ILQRState, multipliers: Tensor, penalty: Tensor) -> LagrangianState:
    fields = {f.name: getattr(inner, f.name) for f in dataclasses.fields(inner)}
    return LagrangianState(**fields, multipliers=multipliers, penalty=penalty)
