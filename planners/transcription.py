"""From a problem to the elements of a nonlinear program: multiple shooting, collocation, Hermite-Simpson.

A model may have branches (scenarios): states of their own under controls that they share or not, and the mean of
their costs.

Reference: Betts 2010, "Practical methods for optimal control and estimation using nonlinear programming", chapter 4;
    Kelly 2017, "An introduction to trajectory optimization"; for branches Lucia, Finkler & Engell 2013, "Multi-stage
    nonlinear model predictive control applied to a semi-batch polymerization reactor under uncertainty".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import casadi
import numpy as np
import numpy.typing as npt
from torch import Tensor

from mbrl.expressions import Expression
from mbrl.planners.predicted import Surroundings, surroundings
from mbrl.planners.separable import Element, element
from mbrl.problem import Constraint
from mbrl.tracing import trace

Transcription = Literal["shooting", "radau", "legendre", "hermite-simpson"]


@dataclass(frozen=True, eq=False)
class Functions:
    """Cost and constraints as CasADi functions. Their last argument p is missing where the problem has no params.

    Attributes:
        stage: (y, u, y_next, k[, p]) -> ℓ.
        rate: (y, u[, p]) -> ℓ per second, or None.
        end: (y[, p]) -> m.
        worth: (x) -> V, or None.
        path, terminal: (y, u, k[, p]) -> g and (y[, p]) -> g, with their constraints.
        params: the size of p.
    """

    stage: casadi.Function
    rate: casadi.Function | None
    end: casadi.Function
    worth: casadi.Function | None
    path: tuple[tuple[Constraint, casadi.Function], ...]
    terminal: tuple[tuple[Constraint, casadi.Function], ...]
    params: int


def functions_of(
    cost: Any,
    terminal_value: Any,
    constraints: tuple[Constraint, ...],
    *,
    nx: int,
    nu: int,
    ny: int,
    params: int,
) -> Functions:
    """Trace what a problem says in torch."""
    task = type(getattr(cost, "task", cost)).__name__
    scalar = functools.partial(trace, size=1)
    y, u, given = (ny,), (nu,), ((params,),) if params else ()

    def last(p: tuple[Tensor, ...]) -> Tensor | None:
        return p[0] if p else None

    def path(fun: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda y, u, k, *p: fun(y, u, k, last(p))

    def end(fun: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda y, *p: fun(y, None, None, last(p))

    rate = None
    if hasattr(cost, "rate"):
        rate = scalar(task, lambda y, u, *p: cost.rate(y, u, last(p)), y, u, *given)
    at_path, at_end = ([c for c in constraints if c.at == at] for at in ("path", "terminal"))
    return Functions(
        stage=scalar(
            task, lambda y, u, y_next, k, *p: cost.stage(y, u, y_next, k, last(p)), y, u, y, (), *given
        ),
        rate=rate,
        end=scalar(task, lambda y, *p: cost.terminal(y, last(p)), y, *given),
        worth=None if terminal_value is None else scalar("terminal_value", terminal_value, (nx,)),
        path=tuple((c, trace(c.label, path(c.fun), y, u, (), *given)) for c in at_path),
        terminal=tuple((c, trace(c.label, end(c.fun), y, *given)) for c in at_end),
        params=params,
    )


@dataclass(frozen=True)
class Discretization:
    """How a step becomes equations.

    Attributes:
        degree: of the polynomials of collocation.
        quadrature: of each branch, (x, u, k, θ[, p]) -> ∫ rate over a step, for shooting.
        dt: seconds per step.
        intervals: into how many a free final time is divided, or None: the time is not free.
        gauss_newton: leave out the second derivatives of dynamics and constraints.
    """

    transcription: Transcription
    degree: int
    quadrature: tuple[casadi.Function | None, ...]
    dt: float
    intervals: int | None
    gauss_newton: bool


@dataclass(frozen=True)
class Rows:
    """Which rows of a stage's c a constraint has, one entry per branch or for all branches, at a point of the step: 0 its
    node, 1 its middle, 2 its end."""

    constraint: Constraint
    rows: npt.NDArray[np.int64]
    point: int


@dataclass(frozen=True)
class Stage:
    """The element of a step or of the end.

    Attributes:
        element: its c is (gaps, equations, constraints).
        variables: where in v they are: of each branch "x", "u", "own", "x_next", "ahead"; "slack" and "T" of all.
        gaps, equations: how many rows.
        constraints: their rows.
        state_only: the rows (of c) that no control enters.
        at_end: the rows of the end of the step, which is the node of the next one.
        surroundings: the same around the predictions of a model, if it predicts many places at once.
    """

    element: Element
    variables: dict[str, list[npt.NDArray[np.int64]]]
    gaps: int
    equations: int
    constraints: tuple[Rows, ...]
    state_only: npt.NDArray[np.bool_]
    at_end: npt.NDArray[np.bool_]
    surroundings: Surroundings | None = None


class _Variables:
    """Named pieces of one symbol: derivatives are taken by whole symbols."""

    def __init__(self, sym: Callable[..., Any], sizes: dict[str, list[int]]):
        flat = [n for branch in sizes.values() for n in branch]
        edges = np.cumsum([0, *flat]).tolist()
        self.v = sym("v", edges[-1])
        pieces = iter(casadi.vertsplit(self.v, edges) if flat else [])
        places = (np.arange(*edge) for edge in pairwise(edges))
        self.pieces = {name: [next(pieces) for _ in branch] for name, branch in sizes.items()}
        self.places = {name: [next(places) for _ in branch] for name, branch in sizes.items()}


def path_stage(
    expressions: tuple[Expression, ...], functions: Functions, how: Discretization, *, spread: float | None
) -> Stage:
    """A step of the horizon; its q is (k, weight, p).

    Args:
        expressions: of each branch.
        spread: constraints hold for the mean of the branches plus so many standard deviations; None: for each.
    """
    sym, nx, nu = _symbols(expressions), expressions[0].nx, expressions[0].nu
    q, theta, thetas = _parameters(sym, expressions, functions)
    k, weight, given = q[0], q[1], _given(functions, q)
    own, ahead = 0, 0
    if how.transcription == "hermite-simpson":
        own = ahead = nu
    elif how.transcription != "shooting":
        own = how.degree * _ode(expressions[0]).numel_out(0)
    S = len(expressions)
    sizes = {"x": [nx] * S, "u": [nu] * S, "own": [own] * S, "x_next": [nx] * S, "ahead": [ahead] * S}
    sizes |= {"slack": [_slacks(functions.path, S, spread)], "T": [int(how.intervals is not None)]}
    variables = _Variables(sym, sizes)
    h = how.dt if how.intervals is None else variables.pieces["T"][0] / how.intervals

    gaps, equations, costs, bends = [], [], [], []
    outputs: list[list[tuple[Any, ...]]] = [[], [], []]  # of each branch at the points of `Rows`
    for s, expression in enumerate(expressions):
        x, u, mine, x_next, next_u = (variables.pieces[n][s] for n in ("x", "u", "own", "x_next", "ahead"))
        step = _Step(expression, functions, thetas[s], k, given, h)
        if how.transcription == "shooting":
            reached, rest, integral = step.shoot(x, u, how.quadrature[s])
            gaps.append(x_next - reached)
        elif how.transcription == "hermite-simpson":
            reached = x_next
            gap, integral, middle = step.hermite_simpson(x, u, mine, x_next, next_u)
            gaps.append(gap)
            outputs[1].append((expression.output(middle), mine, k, *given))
            outputs[2].append((expression.output(x_next), next_u, k, *given))
            rest = None
        else:
            reached, rest, integral = step.collocate(x, u, mine, how.transcription, how.degree)
            gaps.append(x_next - reached)
        equations += [] if rest is None else [rest]
        y, y_next = expression.output(x), expression.output(reached)
        outputs[0].append((y, u, k, *given))
        costs.append(functions.stage(y, u, y_next, k, *given) if integral is None else integral)
        if how.gauss_newton and integral is not None and functions.rate is not None:
            bends.append(h * _gauss_newton(functions.rate, (y, u), given, variables.v))
        elif how.gauss_newton:
            bends.append(_gauss_newton(functions.stage, (y, u, y_next), (k, *given), variables.v))
    heads = casadi.vertcat(*gaps, *equations)
    c, penalty, rows = _constrain(
        functions.path, outputs, variables.pieces["slack"][0], spread, heads.numel()
    )
    cost = weight * (sum(costs) / S + penalty)
    made = element(
        variables.v,
        q,
        theta,
        casadi.vertcat(heads, c),
        cost,
        gauss_newton=weight * sum(bends) / S if how.gauss_newton else None,
    )
    names = ("u", "own", "ahead") if how.transcription == "hermite-simpson" else ("u",)
    controls = np.concatenate([place for name in names for place in variables.places[name]])
    entered = np.unique(made.jacobian[0][np.isin(made.jacobian[1], controls)])
    state_only = ~np.isin(np.arange(made.nc), entered)
    state_only[: heads.numel()] = False
    at_end = np.zeros(made.nc, dtype=bool)
    for part in rows:
        at_end[part.rows] = part.point == 2
    n = sum(gap.numel() for gap in gaps)
    outer = None
    if how.transcription == "shooting" and all(e.batch is not None for e in expressions):
        outer = _surroundings(made, expressions, functions, how, sizes, spread=spread)
    return Stage(made, variables.places, n, heads.numel() - n, rows, state_only, at_end, outer)


def _surroundings(
    whole: Element,
    expressions: tuple[Expression, ...],
    functions: Functions,
    how: Discretization,
    sizes: dict[str, list[int]],
    *,
    spread: float | None,
) -> Surroundings:
    """The same step of models that predict many places at once, around their predictions."""
    S, nx = len(expressions), expressions[0].nx
    variables, q = _Variables(casadi.SX.sym, sizes), casadi.SX.sym("q", 2 + functions.params)
    k, weight, given = q[0], q[1], _given(functions, q)
    r = casadi.SX.sym("r", S * nx)
    gaps, costs, outputs, arguments = [], [], [], []
    for s, expression in enumerate(expressions):
        x, u, x_next = (variables.pieces[name][s] for name in ("x", "u", "x_next"))
        reached = r[s * nx : (s + 1) * nx]
        gaps.append(x_next - reached)
        y, y_next = expression.output(x), expression.output(reached)
        outputs.append((y, u, k, *given))
        costs.append(functions.stage(y, u, y_next, k, *given))
        arguments.append((y, u, y_next))
    heads = casadi.vertcat(*gaps)
    c, penalty, _ = _constrain(functions.path, [outputs], variables.pieces["slack"][0], spread, heads.numel())

    def bend(by_v: Any) -> Any:
        bends = [_gauss_newton(functions.stage, a, (k, *given), variables.v, (r, by_v)) for a in arguments]
        return weight * sum(bends) / S

    edges = np.cumsum([0, *(expression.ntheta for expression in expressions)]).tolist()
    models = [expression.batch for expression in expressions if expression.batch is not None]
    return surroundings(
        whole,
        variables.v,
        q,
        r,
        casadi.vertcat(heads, c),
        weight * (sum(costs) / S + penalty),
        models=tuple(models),
        x=tuple(variables.places["x"]),
        u=tuple(variables.places["u"]),
        theta=tuple(slice(a, b) for a, b in pairwise(edges)),
        gauss_newton=bend if how.gauss_newton else None,
    )


def end_stage(expressions: tuple[Expression, ...], functions: Functions, *, spread: float | None) -> Stage:
    """The end of the horizon; its q is (k, weight, p)."""
    sym, S = _symbols(expressions), len(expressions)
    q, theta, _ = _parameters(sym, expressions, functions)
    given, weight = _given(functions, q), q[1]
    slacks = _slacks(functions.terminal, S, spread)
    variables = _Variables(sym, {"x": [expressions[0].nx] * S, "slack": [slacks]})
    costs, outputs = [], []
    for expression, x in zip(expressions, variables.pieces["x"], strict=True):
        y = expression.output(x)
        outputs.append((y, *given))
        costs.append(functions.end(y, *given) + (0 if functions.worth is None else functions.worth(x)))
    c, penalty, rows = _constrain(functions.terminal, [outputs], variables.pieces["slack"][0], spread, 0)
    made = element(variables.v, q, theta, c, weight * (sum(costs) / S + penalty))
    nothing = np.zeros(made.nc, dtype=bool)
    return Stage(made, variables.places, 0, 0, rows, nothing, nothing)


@dataclass(frozen=True)
class _Step:
    """One step of one branch, of h seconds."""

    expression: Expression
    functions: Functions
    theta: Any
    k: Any
    given: tuple[Any, ...]
    h: Any

    def shoot(self, x: Any, u: Any, quadrature: casadi.Function | None) -> tuple[Any, Any, Any]:
        """Where the model's own step leads, no equations, and the integral of the cost."""
        reached = self.expression.step(x, u, self.k, self.theta)
        paid = None if quadrature is None else quadrature(x, u, self.k, self.theta, *self.given)
        return reached, None, paid

    def collocate(self, x: Any, u: Any, own: Any, points: str, degree: int) -> tuple[Any, Any, Any]:
        """A polynomial through x whose slope is the ODE's at `own`, the states at its points; u is held."""
        ode = _ode(self.expression)
        n = ode.numel_out(0)
        C, D, B = casadi.collocation_coeff(casadi.collocation_points(degree, points))
        moving, held = casadi.vertsplit(x, [0, n, x.numel()])
        nodes = casadi.horzcat(moving, casadi.reshape(own, n, degree))
        inside = [casadi.vertcat(nodes[:, j + 1], held) for j in range(degree)]
        slopes = casadi.horzcat(*[ode(at, u, self.theta) for at in inside])
        reached = nodes @ D
        if held.numel():
            reached = casadi.vertcat(reached, self.expression.step(x, u, self.k, self.theta)[n:])
        integral = None
        if self.functions.rate is not None:
            integral = self.h * sum(float(B[j]) * self._rate(inside[j], u) for j in range(degree))
        return reached, casadi.vec(self.h * slopes - nodes @ C), integral

    def hermite_simpson(self, x: Any, u: Any, middle: Any, x_next: Any, ahead: Any) -> tuple[Any, Any, Any]:
        """The gap of Simpson's rule with the midpoint of a cubic, the integral, the midpoint; u is quadratic in time."""
        ode, h = _ode(self.expression), self.h
        f0, f1 = ode(x, u, self.theta), ode(x_next, ahead, self.theta)
        x_middle = (x + x_next) / 2 + h / 8 * (f0 - f1)
        gap = x_next - x - h / 6 * (f0 + 4 * ode(x_middle, middle, self.theta) + f1)
        if self.functions.rate is None:
            return gap, None, x_middle
        rates = self._rate(x, u) + 4 * self._rate(x_middle, middle) + self._rate(x_next, ahead)
        return gap, h / 6 * rates, x_middle

    def _rate(self, x: Any, u: Any) -> Any:
        assert self.functions.rate is not None
        return self.functions.rate(self.expression.output(x), u, *self.given)


def _constrain(
    asked: tuple[tuple[Constraint, casadi.Function], ...],
    outputs: list[list[tuple[Any, ...]]],
    slack: Any,
    spread: float | None,
    start: int,
) -> tuple[Any, Any, tuple[Rows, ...]]:
    """Constraints of all branches, g or g − slack, the penalty on the slacks, and where their rows begin in c.

    Args:
        outputs: of each branch, at each point of the step where constraints are asked. The points share their slacks.
            Where no control enters, only the first one counts: states move between nodes as a cubic, controls as they like.
    """
    parts, rows, penalty = [type(slack)(0, 1)], [], 0
    free: Iterator[Any] = iter(casadi.vertsplit(slack)) if slack.numel() else iter(())
    for constraint, fun in asked:
        free_inside = len(outputs) > 1 and fun.jac_sparsity(0, 1).nnz() > 0
        asked_at = [branches for branches in outputs if branches] if free_inside else outputs[:1]
        points = [[fun(*output) for output in branches] for branches in asked_at]
        if spread is not None and constraint.kind == "le":
            points = [[_cautious(values, spread)] for values in points]
        sides = 0 if constraint.soft is None else 1 if constraint.kind == "le" else 2
        for values in zip(*points, strict=True):  # of a branch
            n, relief = values[0].numel(), 0
            for side in range(sides):
                slacks = [next(free) for _ in range(n)]
                penalty = penalty + constraint.soft * sum(slacks) / len(points[0])
                relief = relief + (-1) ** side * casadi.vertcat(*slacks)
            for point, g in enumerate(values):
                parts.append(g - relief)
                rows.append(Rows(constraint, np.arange(start, start + n), point))
                start += n
    return casadi.vertcat(*parts), penalty, tuple(rows)


def _cautious(values: list[Any], spread: float) -> Any:
    """The mean of the branches plus so many of their deviations."""
    mean = sum(values) / len(values)
    variance = sum((g - mean) ** 2 for g in values) / len(values)
    # The root of 0 has no derivative. 1e-12: a spread of 1e-6 counts as none.
    return mean + spread * casadi.sqrt(variance + 1e-12)


def _slacks(
    asked: tuple[tuple[Constraint, casadi.Function], ...], branches: int, spread: float | None
) -> int:
    """How many slack variables the soft constraints have."""
    total = 0
    for constraint, fun in asked:
        if constraint.soft is not None:
            sides, times = (
                (1, branches if spread is None else 1) if constraint.kind == "le" else (2, branches)
            )
            total += int(fun.numel_out(0)) * sides * times
    return total


def _gauss_newton(
    cost: casadi.Function,
    arguments: tuple[Any, ...],
    given: tuple[Any, ...],
    v: Any,
    through: tuple[Any, Any] | None = None,
) -> Any:
    """Jᵀ ℓ_aa J of ℓ(a(v)): its Hessian without the second derivatives of the arguments.

    Args:
        through: r and ∂r/∂v, if the arguments depend on r as well.
    """
    symbols = [casadi.SX.sym(f"a{i}", a.numel()) for i, a in enumerate(arguments)]
    fixed = [casadi.SX.sym(f"p{i}", g.numel()) for i, g in enumerate(given)]
    whole = casadi.SX.sym("a", sum(a.numel() for a in arguments))
    pieces = casadi.vertsplit(whole, np.cumsum([0, *(s.numel() for s in symbols)]).tolist())
    bend, _ = casadi.hessian(cost(*pieces, *fixed), whole)
    at = casadi.Function("curvature", [whole, *fixed], [bend])
    a = casadi.vertcat(*arguments)
    J = casadi.jacobian(a, v)
    if through is not None:
        J = J + casadi.jacobian(a, through[0]) @ through[1]
    return J.T @ at(a, *given) @ J


def _symbols(expressions: tuple[Expression, ...]) -> Callable[..., Any]:
    made: Callable[..., Any] = (
        casadi.SX.sym if all(expression.scalar for expression in expressions) else casadi.MX.sym
    )
    return made


def _parameters(
    sym: Callable[..., Any], expressions: tuple[Expression, ...], functions: Functions
) -> tuple[Any, Any, list[Any]]:
    """q, θ, and the part of θ of each branch."""
    edges = np.cumsum([0, *(expression.ntheta for expression in expressions)]).tolist()
    theta = sym("theta", edges[-1])
    return sym("q", 2 + functions.params), theta, casadi.vertsplit(theta, edges)


def _given(functions: Functions, q: Any) -> tuple[Any, ...]:
    return (q[2:],) if functions.params else ()


def _ode(expression: Expression) -> casadi.Function:
    assert expression.ode is not None  # checked by the planner
    return expression.ode
