"""The two operations on a whole horizon that iLQR and DDP are made of: a closed-loop rollout, and derivatives.

By default a loop over time in torch; for `Symbolic` dynamics compiled loops around interpreted expressions, see
`mbrl.symbolic_horizon`. Both speak numpy, in float64, to the compiled sweeps between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mbrl.problem import Problem
from mbrl.quadratize import Expansion, quadratize
from mbrl.rollout import follow
from mbrl.symbolic import Symbolic


class AffinePolicy(NamedTuple):
    """u = clip(ū + α k + φ K (x ⊖ x̄)) of M problems, about trajectories that may have gaps.

    Attributes:
        x, u: (M, H+1, nx) and (M, H, nu), x̄ and ū.
        k, K: (M, H, nu) and (M, H, nu, ndx).
        gap: (M, H, ndx), f(x̄ₜ, ūₜ) ⊖ x̄ₜ₊₁, of which a rollout closes the share α; or (M, 0, ndx): there is none.
        low, high: (nu,).
    """

    x: np.ndarray
    u: np.ndarray
    k: np.ndarray
    K: np.ndarray
    gap: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Rollout(NamedTuple):
    """cost (n, B), states (n, B, H+1, nx) and actions (n, B, H, nu) of B candidates of n problems."""

    cost: np.ndarray
    states: np.ndarray
    actions: np.ndarray


class Derivatives(NamedTuple):
    """An `Expansion` in rows, with N = ndx + nu.

    Attributes:
        steps: (n, H, R), of each step F (ndx, N) = (fx, fu), the slope of the cost (N,) and its Hessian (N, N), one
            after another; then, if second derivatives were asked for, excess (N, N) and fzz (ndx, N, N).
        ends: (n, ndx + ndx²), slope and Hessian of the end.
    """

    steps: np.ndarray
    ends: np.ndarray


class Horizon(Protocol):
    """What iLQR asks of a problem; `rows` (n,) say which of its M rows."""

    def roll(
        self, x0: np.ndarray, policy: AffinePolicy, alpha: np.ndarray, feedback: np.ndarray, rows: np.ndarray
    ) -> Rollout:
        """From x0 (M, nx), for each α and φ (B,)."""
        ...

    def expand(self, policy: AffinePolicy, rows: np.ndarray, *, exact: bool) -> Derivatives:
        """`quadratize` about the policy's trajectories."""
        ...


def horizon_of(problem: Problem[Any, Any, Any]) -> Horizon:
    from mbrl.symbolic_horizon import SymbolicHorizon  # which is one of these

    return SymbolicHorizon(problem) if isinstance(problem.dynamics, Symbolic) else TorchHorizon(problem)


@dataclass(frozen=True)
class TorchHorizon:
    """Any dynamics with derivatives: all candidates of all problems in one batch, step by step."""

    problem: Problem[Any, Any, Any]

    def roll(
        self, x0: np.ndarray, policy: AffinePolicy, alpha: np.ndarray, feedback: np.ndarray, rows: np.ndarray
    ) -> Rollout:
        x, u, k, K, gap = (torch.from_numpy(v[rows])[:, None] for v in policy[:5])
        low, high = torch.from_numpy(policy.low), torch.from_numpy(policy.high)
        a, f = torch.from_numpy(alpha)[None, :, None], torch.from_numpy(feedback)[None, :, None]
        own = getattr(self.problem.dynamics, "difference", None)

        def control(t: int, now: Tensor) -> Tensor:
            there = x[:, :, t].expand_as(now)
            dx = now - there if own is None else own(there, now)
            free = u[:, :, t] + a * k[:, :, t] + f * (K[:, :, t] @ dx[..., None])[..., 0]
            return torch.maximum(torch.minimum(free, high), low)

        move = getattr(self.problem.dynamics, "retract", torch.add)
        jump: Callable[[int, Tensor], Tensor] = lambda t, reached: move(reached, (a - 1) * gap[:, :, t])
        start = torch.from_numpy(x0[rows])[:, None].expand(-1, len(alpha), -1)
        problem = problem_of(self.problem, torch.from_numpy(rows))
        result = follow(
            problem,
            problem.dynamics,
            start,
            control,
            horizon=u.shape[2],
            keep_states=True,
            jump=jump if gap.shape[2] else None,
        )
        assert result.states is not None and result.actions is not None
        return Rollout(result.cost.numpy(), result.states.numpy(), result.actions.numpy())

    def expand(self, policy: AffinePolicy, rows: np.ndarray, *, exact: bool) -> Derivatives:
        x, u = torch.from_numpy(policy.x[rows]), torch.from_numpy(policy.u[rows])
        problem, reached = problem_of(self.problem, torch.from_numpy(rows)), None
        if policy.gap.shape[1]:
            reached = problem.dynamics.step(x[:, :-1], u, torch.arange(u.shape[1]))
        return in_rows(quadratize(problem, x, u, exact=exact, reached=reached))


def in_rows(E: Expansion) -> Derivatives:
    bend = torch.cat([torch.cat([E.lxx[:, :-1], E.lux.mT], -1), torch.cat([E.lux, E.luu], -1)], -2)
    parts = [torch.cat([E.fx, E.fu], -1), torch.cat([E.lx[:, :-1], E.lu], -1), bend]
    parts += [v for v in (E.excess, E.fzz) if v is not None]
    ends = torch.cat([E.lx[:, -1], E.lxx[:, -1].flatten(1)], -1)
    return Derivatives(torch.cat([v.flatten(2) for v in parts], -1).numpy(), ends.numpy())


def problem_of(problem: Problem[Any, Any, Any], rows: Tensor) -> Problem[Any, Any, Any]:
    """The problem of some of the M rows: their parameters."""
    if problem.params is None or problem.params.ndim == 2:
        return problem
    return replace(problem, params=problem.params[rows])
