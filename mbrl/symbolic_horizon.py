"""Whole horizons as CasADi functions, built once per structure; see `mbrl.horizon`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import casadi
import numpy as np
import torch
from torch import Tensor

from mbrl.horizon import AffinePolicy, Rollout
from mbrl.problem import Problem
from mbrl.quadratize import Expansion, weights
from mbrl.symbolic import Symbolic, trace


@dataclass(frozen=True)
class SymbolicHorizon:
    """Dynamics and cost as CasADi expressions."""

    problem: Problem[Symbolic, Any, Any]

    def roll(
        self, x0: Tensor, policy: AffinePolicy, alpha: Tensor, feedback: Tensor, rows: Tensor
    ) -> Rollout:
        n, B, H = len(x0), len(alpha), policy.u.shape[1]
        each = [x0, policy.x, policy.u, policy.k, policy.K, *self._params(rows, x0)]
        args = [v.reshape(n, 1, -1).expand(n, B, -1).reshape(n * B, -1) for v in each]
        args += [v.repeat(n)[:, None] for v in (alpha, feedback)]
        args += [v.expand(n * B, -1) for v in (policy.low, policy.high)]
        x, u, cost = _call(_expressions(self.problem).roll, args)
        cost = cost[:, 0]
        finite = torch.isfinite(cost) & torch.isfinite(x.sum(1))
        cost = torch.where(finite, cost, torch.inf)
        return Rollout(cost.view(n, B), x.view(n, B, H + 1, -1), u.view(n, B, H, -1))

    def expand(self, x: Tensor, u: Tensor, rows: Tensor, *, exact: bool) -> Expansion:
        n, H, nu = u.shape
        functions, ndx = _expressions(self.problem), self.problem.dynamics.ndx
        weight = weights(self.problem, self.problem.dynamics.output(x))
        k = torch.arange(H).to(x).expand(n, -1)
        params = [p.reshape(n, H + 1, -1) for p in self._params(rows, x)]
        each = [x[:, :-1], u, x[:, 1:], k[..., None], weight[:, :-1, None], *(p[:, :-1] for p in params)]
        N = ndx + nu
        results = _call(functions.second if exact else functions.first, [v.flatten(0, 1) for v in each])
        F, slope, bend, *more = results
        F, slope, bend = F.view(n, H, ndx, N), slope.view(n, H, N), bend.view(n, H, N, N)
        ends = [x[:, -1], weight[:, -1, None], *(p[:, -1] for p in params)]
        ex, exx, gauss = _call(functions.terminal, ends)
        exx = (exx if exact else gauss).view(n, ndx, ndx)
        return Expansion(
            fx=F[..., :ndx],
            fu=F[..., ndx:],
            lx=torch.cat([slope[..., :ndx], ex[:, None]], 1),
            lu=slope[..., ndx:],
            lxx=torch.cat([bend[..., :ndx, :ndx], exx[:, None]], 1),
            luu=bend[..., ndx:, ndx:],
            lux=bend[..., ndx:, :ndx],
            excess=more[0].view(n, H, N, N) if exact else None,
            fzz=more[1].view(n, H, ndx, N, N) if exact else None,
        )

    def _params(self, rows: Tensor, like: Tensor) -> list[Tensor]:
        p = self.problem.params
        if p is None:
            return []
        return [(p if p.ndim == 3 else p.expand(int(rows.max()) + 1, -1, -1))[rows].to(like)]


class _Expressions:
    """The CasADi functions of one structure. In matrices of results the last axis runs fastest, as in numpy.

    Args:
        params: how many parameters the cost takes at each step.
    """

    def __init__(
        self,
        dynamics: Symbolic,
        cost: Any,
        terminated: Any,
        terminal_value: Any,
        *,
        horizon: int,
        params: int,
        discount: float,
        termination_cost: float,
    ):
        self.nx, self.ndx, self.nu, self.ny = dynamics.nx, dynamics.ndx, dynamics.nu, dynamics.ny
        self.horizon, self.params = horizon, params
        self.discount, self.termination_cost = discount, termination_cost
        plant = type(dynamics.dynamics).__name__
        task = type(getattr(cost, "task", cost)).__name__
        vector, scalar, given = (self.ny,), (), ((params,),) if params else ()

        def stage(y: Tensor, u: Tensor, y_next: Tensor, k: int, *p: Tensor) -> Tensor:
            result: Tensor = cost.stage(y, u, y_next, k, p[0] if p else None)
            return result

        def terminal(y: Tensor, *p: Tensor) -> Tensor:
            result: Tensor = cost.terminal(y, p[0] if p else None)
            return result

        self.step = trace(plant, dynamics.step, (self.nx,), (self.nu,), scalar)
        self.output = trace(plant, dynamics.output, (self.nx,))
        self.retract = trace(plant, dynamics.retract, (self.nx,), (self.ndx,))
        self.difference = trace(plant, dynamics.difference, (self.nx,), (self.nx,))
        self.stage = trace(task, stage, vector, (self.nu,), vector, scalar, *given)
        self.end = trace(task, terminal, vector, *given)
        self.value, self.ended = None, None
        if terminal_value is not None:
            self.value = trace("terminal_value", terminal_value, (self.nx,))
        if terminated is not None:
            self.ended = trace(task, lambda y: terminated(y).double(), vector)
        self.first, self.second = self._step_functions()
        self.terminal = self._terminal_function()
        self.roll = self._roll_function()

    def _step_functions(self) -> tuple[casadi.Function, casadi.Function]:
        """(F, slope, bend) of one step from (x, u, x_next, k, weight[, p]), and with (excess, fzz); see `Expansion`."""
        sym, nu, ny, ndx = casadi.SX.sym, self.nu, self.ny, self.ndx
        x, u, x_next, k, w = sym("x", self.nx), sym("u", nu), sym("x_next", self.nx), sym("k"), sym("w")
        p = [sym("p", self.params)] if self.params else []
        d = sym("d", ndx + nu)  # the tangent of (x, u)
        moved, pushed = self.retract(x, d[:ndx]), u + d[ndx:]
        reached = self.step(moved, pushed, k)
        y, y_next, shift = self.output(moved), self.output(reached), self.difference(x_next, reached)

        def here(expression: Any) -> Any:
            return casadi.substitute(expression, d, casadi.SX.zeros(ndx + nu))

        arguments = casadi.vertcat(y, pushed, y_next)
        z = sym("z", 2 * ny + nu)
        bend_z, _ = casadi.hessian(self.stage(z[:ny], z[ny : ny + nu], z[ny + nu :], k, *p), z)
        J = here(casadi.jacobian(arguments, d))
        gauss = w * (J.T @ casadi.substitute(bend_z, z, casadi.densify(here(arguments))) @ J)
        gauss = (gauss + gauss.T) / 2
        exact, slope = casadi.hessian(self.stage(y, pushed, y_next, k, *p), d)
        fzz = casadi.vertcat(*[_rows(here(casadi.hessian(shift[i], d)[0])) for i in range(ndx)])
        given = [x, u, x_next, k, w, *p]
        first = [_rows(here(casadi.jacobian(shift, d))), _rows(w * here(slope)), _rows(gauss)]
        second = [*first, _rows(w * here(exact) - gauss), fzz]
        return casadi.Function("first", given, first), casadi.Function("second", given, second)

    def _terminal_function(self) -> casadi.Function:
        """Slope, exact and Gauss-Newton Hessian of the end from (x, weight[, p])."""
        sym = casadi.SX.sym
        x, w, dx, y = sym("x", self.nx), sym("w"), sym("dx", self.ndx), sym("y", self.ny)
        p = [sym("p", self.params)] if self.params else []
        moved = self.retract(x, dx)
        seen = self.output(moved)
        worth = 0 if self.value is None else self.value(moved)
        bend_y, _ = casadi.hessian(self.end(y, *p), y)
        G = casadi.jacobian(seen, dx)
        gauss = G.T @ casadi.substitute(bend_y, y, casadi.densify(seen)) @ G
        if self.value is not None:
            gauss = gauss + casadi.hessian(worth, dx)[0]
        exact, slope = casadi.hessian(self.end(seen, *p) + worth, dx)
        results = [casadi.substitute(e, dx, casadi.SX.zeros(self.ndx)) for e in (slope, exact, gauss)]
        return casadi.Function("terminal", [x, w, *p], [_rows(w * result) for result in results])

    def _roll_function(self) -> casadi.Function:
        """(states, actions, cost) of the closed loop, whose cost is that of `mbrl.evaluate`."""
        sym, H, nx, nu, ndx = casadi.SX.sym, self.horizon, self.nx, self.nu, self.ndx
        x0, X, U, k = sym("x0", nx), sym("X", nx, H + 1), sym("U", nu, H), sym("k", nu, H)
        K, P = sym("K", ndx * nu, H), [sym("P", self.params, H + 1)] if self.params else []
        alpha, feedback, low, high = sym("alpha"), sym("feedback"), sym("low", nu), sym("high", nu)
        x, y, total, weight, alive = x0, self.output(x0), casadi.SX(0), 1.0, None
        states, actions = [x0], []
        for t in range(H):
            gain = casadi.reshape(K[:, t], ndx, nu).T
            free = U[:, t] + alpha * k[:, t] + feedback * (gain @ self.difference(X[:, t], x))
            u = casadi.fmax(casadi.fmin(free, high), low)
            x = self.step(x, u, t)
            y, before = self.output(x), y
            total += _weigh(weight * self.stage(before, u, y, t, *(p[:, t] for p in P)), alive)
            if self.ended is not None:
                over, alive = self.ended(y), casadi.SX(1) if alive is None else alive
                total += _weigh(weight * self.termination_cost * over, alive)
                alive = _weigh(1 - over, alive)
            weight *= self.discount
            states.append(x)
            actions.append(u)
        end = self.end(y, *(p[:, H] for p in P)) + (0 if self.value is None else self.value(x))
        total += _weigh(weight * end, alive)
        given = [x0, X, U, k, K, *P, alpha, feedback, low, high]
        return casadi.Function("roll", given, [casadi.vertcat(*states), casadi.vertcat(*actions), total])


def _weigh(cost: Any, alive: Any) -> Any:
    """cost times the probability of being alive, 0 where that is 0: there the cost may be NaN."""
    return cost if alive is None else casadi.if_else(alive > 0, alive * cost, 0)


def _rows(expression: Any) -> Any:
    """A matrix as a column in which its last axis runs fastest."""
    return casadi.vec(casadi.densify(expression).T)


_built = functools.lru_cache(maxsize=32)(_Expressions)


def _expressions(problem: Problem[Symbolic, Any, Any]) -> _Expressions:
    return _built(
        problem.dynamics,
        problem.cost,
        problem.terminated,
        problem.terminal_value,
        horizon=problem.horizon,
        params=0 if problem.params is None else problem.params.shape[-1],
        discount=problem.discount,
        termination_cost=problem.termination_cost,
    )


@functools.lru_cache(maxsize=256)
def _mapped(function: casadi.Function, n: int, threads: int) -> tuple[Any, Any]:
    """The buffer of `function` of n columns at once, and what runs it."""
    if n > 1:
        function = function.map(n, "thread", threads) if threads > 1 else function.map(n)
    buffer, run = function.buffer()
    return buffer, run


def _call(function: casadi.Function, args: list[Tensor]) -> list[Tensor]:
    """Results (n, size) of arguments (n, size)."""
    n = len(args[0])
    threads = torch.get_num_threads() if n >= 64 else 1  # to start threads takes longer than a few rows
    buffer, run = _mapped(function, n, threads)
    held: list[Any] = [np.ascontiguousarray(a.numpy()) for a in args]
    results: list[Any] = [np.empty((n, function.numel_out(i))) for i in range(function.n_out())]
    for i, array in enumerate(held):
        buffer.set_arg(i, memoryview(array))
    for i, array in enumerate(results):
        buffer.set_res(i, memoryview(array))
    run()
    return [torch.from_numpy(r) for r in results]
