"""Elements whose next states come from a model that predicts many places at once, such as networks.

What surrounds the model, cost and constraints, is made of scalar expressions of v and of the predictions r(v), given
numerically with their derivatives R = ∂r/∂v and C, the Hessian of λᵣᵀ r:

    c' = c_v + c_r R,   H = L_vv + L_vr R + (L_vr R)ᵀ + Rᵀ L_rr R + C,   λᵣ = L_r,   L = σ ℓ + λᵀc
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import casadi
import numpy as np

from mbrl.planners.buffered import Array
from mbrl.planners.separable import Element, Indices
from mbrl.programs import program, registers, run


@dataclass(frozen=True)
class Surroundings:
    """An element in terms of its predictions; S branches of nx numbers, and d = nx + nu.

    Attributes:
        value: (v, q, r) -> (c, ℓ).
        first: (v, q, r, R) -> (c, ℓ, nonzeros of ∂c/∂v, ∂ℓ/∂v), the nonzeros those of the element.
        dual: (v, q, r, σ, λ) -> λᵣ.
        second: (v, q, r, R, C, σ, λ) -> the element's nonzeros of H.
        models: `Expression.batch` of each branch.
        x, u: where in v its arguments are.
        theta: where in θ its parameters are.
    """

    value: casadi.Function
    first: casadi.Function
    dual: casadi.Function
    second: casadi.Function
    models: tuple[Callable[..., Any], ...]
    x: tuple[Indices, ...]
    u: tuple[Indices, ...]
    theta: tuple[slice, ...]

    def lanes(self, kind: str, take: Indices, theta: Indices, give: Indices) -> Predicted:
        """`Lanes` of "value", "first" or "second"."""
        return Predicted(self, kind, take, theta, give)


def surroundings(
    whole: Element,
    v: Any,
    q: Any,
    r: Any,
    c: Any,
    cost: Any,
    *,
    models: tuple[Callable[..., Any], ...],
    x: tuple[Indices, ...],
    u: tuple[Indices, ...],
    theta: tuple[slice, ...],
    gauss_newton: Callable[[Any], Any] | None,
) -> Surroundings:
    """Of expressions c and cost in symbols v, q and r, the predictions of all branches.

    Args:
        whole: the same element as one expression, whose nonzeros are wanted.
        gauss_newton: from R, as ∂r/∂v, to what the Hessian of ℓ is replaced by; then that of c is left out.
    """
    sym, nv, nr, S = casadi.SX.sym, v.numel(), r.numel(), len(models)
    nx, d = nr // S, len(x[0]) + len(u[0])
    R, C = sym("R", nx * d * S), sym("C", d * d * S)
    by_v, bent = casadi.SX(nr, nv), casadi.SX(nv, nv)
    for s in range(S):
        places = [*x[s].tolist(), *u[s].tolist()]
        # Arrays count row by row, CasADi column by column.
        by_v[s * nx : (s + 1) * nx, places] = casadi.reshape(R[s * nx * d : (s + 1) * nx * d], d, nx).T
        bent[places, places] += casadi.reshape(C[s * d * d : (s + 1) * d * d], d, d)
    sigma, multipliers = sym("sigma"), sym("lambda", c.numel())
    values = casadi.vertcat(c, cost)
    J = casadi.jacobian(c, v) + casadi.jacobian(c, r) @ by_v
    slope = casadi.jacobian(cost, v) + casadi.jacobian(cost, r) @ by_v
    L = sigma * cost + casadi.dot(multipliers, c)
    both = casadi.vertcat(v, r)
    full, gradient = casadi.hessian(L, both)
    if gauss_newton is None:
        across = full[:nv, nv:] @ by_v
        H = full[:nv, :nv] + across + across.T + by_v.T @ full[nv:, nv:] @ by_v + bent
    else:
        H = sigma * gauss_newton(by_v)
    return Surroundings(
        value=_function([v, q, r], values),
        first=_function([v, q, r, R], casadi.vertcat(values, _entries(J, whole.jacobian), slope.T)),
        dual=_function([v, q, r, sigma, multipliers], gradient[nv:]),
        second=_function([v, q, r, R, C, sigma, multipliers], _entries(H, whole.hessian)),
        models=models,
        x=x,
        u=u,
        theta=theta,
    )


def _entries(matrix: Any, places: tuple[Indices, Indices]) -> Any:
    pairs = zip(*(i.tolist() for i in places), strict=True)
    return casadi.vertcat(casadi.SX(0, 1), *[matrix[i, j] for i, j in pairs])


def _function(given: list[Any], result: Any) -> casadi.Function:
    return casadi.Function("surroundings", given, [casadi.cse(casadi.densify(result))])


class Predicted:
    """`Lanes` of one of an element's functions."""

    def __init__(self, outer: Surroundings, kind: str, take: Indices, theta: Indices, give: Indices):
        self._outer, self._order = outer, ("value", "first", "second").index(kind)
        self._take, self._give, self._theta = take, give.ravel(), theta
        nv, nq = outer.value.numel_in(0), outer.value.numel_in(1)
        self._parts = np.cumsum([nv, nq]).tolist()
        lanes = take.shape[1]
        self._run = _Interpreter((outer.value, outer.first, outer.second)[self._order], lanes)
        self._dual = _Interpreter(outer.dual, lanes)

    def __call__(self, source: Array, total: Array) -> None:
        outer = self._outer
        v, q, dual = np.split(source[self._take], self._parts)
        theta = source[self._theta]
        given = [(v[x].T, v[u].T, theta[t]) for x, u, t in zip(outer.x, outer.u, outer.theta, strict=True)]
        lam: list[Array | None] = [None] * len(given)
        if self._order == 2:
            r = [model(*g)[0].T for model, g in zip(outer.models, given, strict=True)]
            lam = [part.T for part in np.split(self._dual(v, q, *r, dual), len(given))]
        found = [
            model(*g, multipliers, order=self._order)
            for model, g, multipliers in zip(outer.models, given, lam, strict=True)
        ]
        columns = [
            part.reshape(len(part), -1).T
            for order in range(self._order + 1)
            for part in (f[order] for f in found)
        ]
        result = self._run(v, q, *columns, dual)
        total += np.bincount(self._give, result.ravel(), len(total))


class _Interpreter:
    """A function of one result at many places: arguments (n, L) one below the other, result (m, L)."""

    def __init__(self, function: casadi.Function, lanes: int):
        self._program = program(function)
        self._w = registers(self._program, lanes)

    def __call__(self, *arguments: Array) -> Array:
        start = 0
        for a in arguments:
            self._w[start : start + len(a)] = a
            start += len(a)
        run(self._program, self._w)
        result: Array = self._w[self._program.outputs]
        return result
