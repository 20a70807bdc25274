"""Whole horizons of symbolic problems: compiled loops around interpreted expressions; see `mbrl.horizon`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import casadi
import numpy as np
import torch
from torch import Tensor

from mbrl.compiled import in_threads
from mbrl.errors import ContractError
from mbrl.horizon import AffinePolicy, Derivatives, Rollout
from mbrl.horizon_kernels import Loop, expand, expand_ends, roll
from mbrl.problem import Problem
from mbrl.programs import Program, program
from mbrl.quadratize import weights
from mbrl.symbolic import Symbolic
from mbrl.tracing import trace


@dataclass(frozen=True)
class SymbolicHorizon:
    """Dynamics and cost as programs."""

    problem: Problem[Symbolic, Any, Any]

    def roll(
        self, x0: np.ndarray, policy: AffinePolicy, alpha: np.ndarray, feedback: np.ndarray, rows: np.ndarray
    ) -> Rollout:
        (n, B), (H, nu) = (len(rows), len(alpha)), policy.u.shape[1:]
        result = Rollout(np.empty((n, B)), np.empty((n, B, H + 1, x0.shape[1])), np.empty((n, B, H, nu)))
        loop, params = _expressions(self.problem).loop, self._params()

        def part(start: int, stop: int) -> None:
            roll(start, stop, rows, x0, policy, alpha, feedback, params, loop, result)

        in_threads(part, n * B, steps=n * B * H)
        return result

    def expand(self, policy: AffinePolicy, rows: np.ndarray, *, exact: bool) -> Derivatives:
        n, H, functions = len(rows), policy.u.shape[1], _expressions(self.problem)
        stage, terminal = functions.stage_model[exact], functions.terminal_model[exact]
        D = Derivatives(np.empty((n, H, len(stage.outputs))), np.empty((n, len(terminal.outputs))))
        params, weight = self._params(), self._weights(policy.x, rows)

        def part(start: int, stop: int) -> None:
            expand(start, stop, rows, policy, params, weight, stage, D)

        in_threads(part, n * H, steps=n * H)
        expand_ends(rows, policy, params, weight, terminal, D)
        return D

    def _params(self) -> np.ndarray:
        """(M or 1, H+1, np)."""
        p = self.problem.params
        if p is None:
            return np.empty((1, self.problem.horizon + 1, 0))
        return np.ascontiguousarray((p if p.ndim == 3 else p[None]).double().numpy())

    def _weights(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n or 1, H+1)."""
        if self.problem.terminated is None:
            return self.problem.discount ** np.arange(x.shape[1], dtype=np.float64)[None]
        y = self.problem.dynamics.output(torch.from_numpy(x[rows]))
        return np.ascontiguousarray(weights(self.problem, y).numpy())


class _Expressions:
    """The programs of one structure. In matrices of results the last axis runs fastest, as in numpy.

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
        params: int,
        discount: float,
        termination_cost: float,
    ):
        self.nx, self.ndx, self.nu, self.ny = dynamics.nx, dynamics.ndx, dynamics.nu, dynamics.ny
        self.params = params
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
        self.stage_model = self._stage_models()
        self.terminal_model = self._terminal_models()
        self.loop = self._loop(discount, termination_cost)

    def _stage_models(self) -> tuple[Program, Program]:
        """From (x, u, x_next, k, weight[, p]) to a row of `Derivatives.steps`, Gauss-Newton and exact."""
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
        gauss_newton, newton = (casadi.Function("stage", given, results) for results in (first, second))
        return program(gauss_newton), program(newton)

    def _terminal_models(self) -> tuple[Program, Program]:
        """From (x, weight[, p]) to a row of `Derivatives.ends`, Gauss-Newton and exact."""
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
        slope, gauss, exact = (
            _rows(w * casadi.substitute(e, dx, casadi.SX.zeros(self.ndx))) for e in (slope, gauss, exact)
        )
        gauss_newton, newton = (
            casadi.Function("terminal", [x, w, *p], [slope, bend]) for bend in (gauss, exact)
        )
        return program(gauss_newton), program(newton)

    def _loop(self, discount: float, termination_cost: float) -> Loop:
        sym = casadi.SX.sym
        x, u, k, p = sym("x", self.nx), sym("u", self.nu), sym("k"), sym("p", self.params)
        other, dx = sym("other", self.nx), sym("dx", self.ndx)
        given = [p] if self.params else []
        reached = self.step(x, u, k)
        y, y_next = self.output(x), self.output(reached)
        over = casadi.SX(0) if self.ended is None else self.ended(y_next)
        end = self.end(y, *given) + (0 if self.value is None else self.value(x))
        paid = self.stage(y, u, y_next, k, *given)
        moved, away = self.retract(x, dx), self.difference(x, other)
        made = {
            "step": ([x, u, k, p], [reached, paid, over]),
            "end": ([x, p], [end]),
            "difference": ([x, other], [away]),
            "retract": ([x, dx], [moved]),
        }
        functions = {
            name: program(casadi.Function(name, a, [casadi.densify(r) for r in results]))
            for name, (a, results) in made.items()
        }
        return Loop(**functions, discount=discount, termination_cost=termination_cost)


def _rows(expression: Any) -> Any:
    """A matrix as a column in which its last axis runs fastest."""
    return casadi.vec(casadi.densify(expression).T)


_built = functools.lru_cache(maxsize=32)(_Expressions)


def _expressions(problem: Problem[Symbolic, Any, Any]) -> _Expressions:
    try:
        return _built(
            problem.dynamics,
            problem.cost,
            problem.terminated,
            problem.terminal_value,
            params=0 if problem.params is None else problem.params.shape[-1],
            discount=problem.discount,
            termination_cost=problem.termination_cost,
        )
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise ContractError(
            "Symbolic traces dynamics and costs once and needs them to stay as they are, but one can be changed: "
            f"{error}. Make its dataclass frozen; numbers that vary belong into Problem.params."
        ) from error
