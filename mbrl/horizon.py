"""The two operations on a whole horizon that iLQR and DDP are made of: a closed-loop rollout, and derivatives.

By default a loop over time in torch; for `Symbolic` dynamics CasADi functions that are built once per structure
(dynamics, cost, horizon) and take states, controls, bounds and parameters as arguments. Measured on a unicycle of 100
steps, one problem: 25 times faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mbrl.problem import Problem
from mbrl.quadratize import Expansion, quadratize
from mbrl.rollout import follow
from mbrl.symbolic import Symbolic


@dataclass(frozen=True)
class AffinePolicy:
    """u = clip(ū + α k + φ K (x ⊖ x̄)) of n problems.

    Attributes:
        x, u: (n, H+1, nx) and (n, H, nu), x̄ and ū.
        k, K: (n, H, nu) and (n, H, nu, ndx).
        low, high: (nu,).
    """

    x: Tensor
    u: Tensor
    k: Tensor
    K: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Rollout:
    """cost (n, B), states (n, B, H+1, nx) and actions (n, B, H, nu) of B candidates of n problems."""

    cost: Tensor
    states: Tensor
    actions: Tensor


class Horizon(Protocol):
    """What iLQR asks of a problem."""

    def roll(
        self, x0: Tensor, policy: AffinePolicy, alpha: Tensor, feedback: Tensor, rows: Tensor
    ) -> Rollout:
        """From x0 (n, nx), for each α and φ (B,); `rows` (n,) say which of the M problems they are."""
        ...

    def expand(self, x: Tensor, u: Tensor, rows: Tensor, *, exact: bool) -> Expansion:
        """`quadratize` about x (n, H+1, nx) and u (n, H, nu)."""
        ...


def horizon_of(problem: Problem[Any, Any, Any]) -> Horizon:
    from mbrl.symbolic_horizon import SymbolicHorizon  # which is one of these

    return SymbolicHorizon(problem) if isinstance(problem.dynamics, Symbolic) else TorchHorizon(problem)


@dataclass(frozen=True)
class TorchHorizon:
    """Any dynamics with derivatives: all candidates of all problems in one batch, step by step."""

    problem: Problem[Any, Any, Any]

    def roll(
        self, x0: Tensor, policy: AffinePolicy, alpha: Tensor, feedback: Tensor, rows: Tensor
    ) -> Rollout:
        x, u, k, K = (v[:, None] for v in (policy.x, policy.u, policy.k, policy.K))
        a, f = alpha[None, :, None], feedback[None, :, None]
        own = getattr(self.problem.dynamics, "difference", None)

        def control(t: int, now: Tensor) -> Tensor:
            there = x[:, :, t].expand_as(now)
            dx = now - there if own is None else own(there, now)
            free = u[:, :, t] + a * k[:, :, t] + f * (K[:, :, t] @ dx[..., None])[..., 0]
            return torch.maximum(torch.minimum(free, policy.high), policy.low)

        start = x0[:, None].expand(-1, len(alpha), -1)
        problem = problem_of(self.problem, rows)
        result = follow(problem, problem.dynamics, start, control, horizon=u.shape[2], keep_states=True)
        assert result.states is not None and result.actions is not None
        return Rollout(result.cost, result.states, result.actions)

    def expand(self, x: Tensor, u: Tensor, rows: Tensor, *, exact: bool) -> Expansion:
        return quadratize(problem_of(self.problem, rows), x, u, exact=exact)


def problem_of(problem: Problem[Any, Any, Any], rows: Tensor) -> Problem[Any, Any, Any]:
    """The problem of some of the M rows: their parameters."""
    if problem.params is None or problem.params.ndim == 2:
        return problem
    return replace(problem, params=problem.params[rows])
