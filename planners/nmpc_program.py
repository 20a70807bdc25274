"""What nonlinear MPC builds once per structure: the program, its solver, and rollouts of what comes out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import casadi
import numpy as np

from mbrl.errors import ContractError
from mbrl.expressions import Expression
from mbrl.planners.buffered import Array, Buffered
from mbrl.planners.generated import generated
from mbrl.planners.nlp import OptimalControl
from mbrl.planners.nlp_solver import QP, Solver, SolverName
from mbrl.planners.separable import Called, Interpreted
from mbrl.planners.transcription import (
    Discretization,
    Functions,
    Transcription,
    end_stage,
    functions_of,
    path_stage,
)
from mbrl.problem import Constraint


@dataclass(frozen=True)
class Settings:
    """Those of `NMPC` that decide what is built."""

    transcription: Transcription
    degree: int
    solver: SolverName
    qp: QP
    gauss_newton: bool
    iterations: int
    tolerance: float
    deadline: bool
    generate_code: bool
    free_time: bool
    shared: int
    spread: float | None


@dataclass(frozen=True)
class Roll:
    """Where actions lead.

    Attributes:
        cost: (S,), of each branch.
        states: (S, H+1, nx).
        violation: the largest of a hard constraint.
        violated: hard constraints that are, in words, the largest violation first.
    """

    cost: Array
    states: Array
    violation: float
    violated: tuple[str, ...]


class NMPCProgram:
    """The program of one structure.

    Args:
        expressions: of each branch.
        horizon, dt: steps, and seconds per step.
        params: how many parameters the cost takes at each step.
    """

    def __init__(
        self,
        expressions: tuple[Expression, ...],
        cost: Any,
        terminal_value: Any,
        constraints: tuple[Constraint, ...],
        *,
        horizon: int,
        dt: float,
        params: int,
        settings: Settings,
    ):
        first = expressions[0]
        functions = functions_of(
            cost,
            terminal_value,
            constraints,
            nx=first.nx,
            nu=first.nu,
            ny=int(first.output.numel_out(0)),
            params=params,
        )
        made: tuple[casadi.Function | None, ...] = (None,) * len(expressions)
        if functions.rate is not None and settings.transcription == "shooting":
            made = tuple(e.quadrature and e.quadrature(cost.rate, params) for e in expressions)
        how = Discretization(
            transcription=settings.transcription,
            degree=settings.degree,
            quadrature=made,
            dt=dt,
            intervals=horizon if settings.free_time else None,
            gauss_newton=settings.gauss_newton,
        )
        lanes: type[Interpreted | Called] = Interpreted if all(e.scalar for e in expressions) else Called
        self.control = OptimalControl(
            path_stage(expressions, functions, how, spread=settings.spread),
            end_stage(expressions, functions, spread=settings.spread),
            horizon=horizon,
            shared=settings.shared,
            lanes=lanes,
        )
        self.solver = Solver(
            self.control,
            settings.solver,
            iterations=settings.iterations,
            tolerance=settings.tolerance,
            qp=settings.qp,
            deadline=settings.deadline,
            code=settings.generate_code,
        )
        self._functions, self._sizes = functions, [e.ntheta for e in expressions]
        # Expressions of one structure are rolled out by one function.
        rolls = {e: _rollout(e, functions, horizon, code=settings.generate_code) for e in expressions}
        self._rolls = [rolls[e] for e in expressions]

    def actions(self, z: Array) -> Array:
        """The controls (S, H, nu) of each branch, held for a step: means of those that are not."""
        control = self.control
        u = z[control.controls].swapaxes(0, 1)
        if not control.ahead.size:
            return u
        later = np.concatenate([u[:, 1:], z[control.ahead][:, None]], 1)
        mean: Array = (u + 4 * z[control.own].swapaxes(0, 1) + later) / 6
        return mean

    def nodes(self, z: Array, f: float, g: Array) -> Roll:
        """The program's own states instead of a rollout, for steps that do not last dt."""
        control, found = self.control, []
        for rows, steps, constraint in control.named():
            v = np.abs(g[rows]) if constraint.kind == "eq" else g[rows]
            if constraint.soft is None and v.size and v.max() > 0:
                at = steps.ravel()[v.argmax()]
                place = "the end" if at == control.horizon else f"step {at}"
                found.append((float(v.max()), f"{constraint.label} is violated by {v.max():.3g} at {place}"))
        found.sort(key=lambda pair: -pair[0])
        states = z[control.states].reshape(control.horizon + 1, control.branches, -1).swapaxes(0, 1)
        worst = found[0][0] if found else 0.0
        return Roll(np.full(control.branches, f), states, worst, tuple(text for _, text in found))

    def roll(self, x: Array, u: Array, q: Array, theta: Array) -> Roll:
        """From x (nx,) under u (S, H, nu) of each branch; q: (H+1, 2 + np)."""
        costs, states, found = [], [], list[tuple[float, str]]()
        edges = np.cumsum([0, *self._sizes])
        for s, function in enumerate(self._rolls):
            cost, led, path, end = function(x, u[s], q, theta[edges[s] : edges[s + 1]])
            costs.append(float(cost[0]))
            states.append(np.vstack([x, led]))
            found += self._violations(path, end)
        found.sort(key=lambda pair: -pair[0])
        violated = tuple(dict.fromkeys(text for _, text in found))
        return Roll(np.array(costs), np.stack(states), found[0][0] if found else 0.0, violated)

    def _violations(self, path: Array, end: Array) -> list[tuple[float, str]]:
        """By how much each hard constraint is violated where it is worst, if it is: path (H, n), end (m,)."""
        found = []
        for values, asked in ((path, self._functions.path), (end[None], self._functions.terminal)):
            start = 0
            for constraint, function in asked:
                n = int(function.numel_out(0))
                g = values[:, start : start + n]
                start += n
                if constraint.soft is not None or not n:
                    continue
                v = np.abs(g) if constraint.kind == "eq" else g
                k, i = np.unravel_index(np.argmax(v), v.shape)  # NaN counts as largest
                if not v[k, i] <= 0:
                    amount = float(np.nan_to_num(v[k, i], nan=np.inf))
                    at = f"step {k}" if values is path else "the end"
                    row = f"[{i}]" if n > 1 else ""
                    found.append((amount, f"{constraint.label}{row} is violated by {amount:.3g} at {at}"))
        return found


def _rollout(expression: Expression, functions: Functions, horizon: int, *, code: bool) -> Buffered:
    """(x0, u (H, nu), q (H+1, 2 + np), θ) -> cost (1,), states (H, nx), path constraints (H, n), terminal ones (m,).

    Of path constraints that no control enters, step 0 counts as held: nothing can change them there.
    """
    sym = casadi.SX.sym if expression.scalar else casadi.MX.sym
    x, u, q = sym("x", expression.nx), sym("u", expression.nu), sym("q", 2 + functions.params)
    theta = sym("theta", expression.ntheta)
    given = (q[2:],) if functions.params else ()
    x_next = expression.step(x, u, q[0], theta)
    y, y_next = expression.output(x), expression.output(x_next)
    paid = q[1] * functions.stage(y, u, y_next, q[0], *given)
    path = casadi.vertcat(sym("none", 0), *[fun(y, u, q[0], *given) for _, fun in functions.path])
    step = casadi.Function("step", [x, u, q, theta], [x_next, paid, path])
    worth = functions.end(y, *given) + (0 if functions.worth is None else functions.worth(x))
    terminal = casadi.vertcat(sym("none", 0), *[fun(y, *given) for _, fun in functions.terminal])
    end = casadi.Function("end", [x, q], [q[1] * worth, terminal])

    x0, U = casadi.MX.sym("x0", expression.nx), casadi.MX.sym("u", expression.nu, horizon)
    Q, weights = (
        casadi.MX.sym("q", 2 + functions.params, horizon + 1),
        casadi.MX.sym("theta", expression.ntheta),
    )
    at, total, states, paths = x0, casadi.MX(0), [], []
    for k in range(horizon):
        at, cost, g = step(at, U[:, k], Q[:, k], weights)
        total = total + cost
        states.append(at)
        paths.append(g)
    if path.numel():
        entered = set(casadi.jacobian(path, u).sparsity().get_triplet()[0])
        blind = [i for i in range(path.numel()) if i not in entered]
        if blind:
            paths[0] = (
                casadi.MX(casadi.DM([0.0 if i in blind else 1.0 for i in range(path.numel())])) * paths[0]
            )
    cost, last = end(at, Q[:, horizon])
    results = [total + cost, casadi.horzcat(*states), casadi.horzcat(*paths), last]
    whole = casadi.Function("rollout", [x0, U, Q, weights], [casadi.densify(r) for r in results])
    if code:
        (whole,) = generated([whole])
    return Buffered(whole, [(1,), (horizon, expression.nx), (horizon, path.numel()), (terminal.numel(),)])


_built = functools.lru_cache(maxsize=32)(NMPCProgram)


def nmpc_program(expressions: tuple[Expression, ...], problem: Any, settings: Settings) -> NMPCProgram:
    """The program of a problem's structure, built once.

    Raises:
        ContractError: something that it is built of can be changed.
    """
    try:
        return _built(
            expressions,
            problem.cost,
            problem.terminal_value,
            problem.constraints,
            horizon=problem.horizon,
            dt=problem.dynamics.dt,
            params=0 if problem.params is None else problem.params.shape[-1],
            settings=settings,
        )
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise ContractError(
            "Costs and constraints are traced once and have to stay as they are, but one can be changed: "
            f"{error}. Make its dataclass frozen; numbers that vary belong into Problem.params."
        ) from error
