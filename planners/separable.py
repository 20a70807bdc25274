"""Partially separable programs: sums of one small function of few variables at many places.

    minimise  Σₑ Σₗ ℓₑ(z[vₑₗ], qₑₗ, θ)   subject to  lower ≤ g(z) ≤ upper,   g[rₑₗ] = cₑ(z[vₑₗ], qₑₗ, θ)

Optimal control has one kind of element per step of the horizon and one for its end. All places of a kind are evaluated
at once, as lanes of one compiled interpreter or as one CasADi function. Each function has few derivatives of its own;
those of the program are put together from them.

Reference: Griewank & Toint 1982, "On the unconstrained optimization of partially separable functions".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import casadi
import numpy as np
import numpy.typing as npt

from mbrl.compiled import kernel
from mbrl.planners.buffered import Array, Buffered
from mbrl.programs import Program, program, registers, run

Indices = npt.NDArray[np.int64]


class Lanes(Protocol):
    """A function at L places: takes its arguments from one vector and adds its results to another."""

    def __call__(self, source: Array, total: Array) -> None: ...


class Interpreted:
    """A function of scalar expressions and of one result, all places at a time.

    Args:
        take: (n, L), where in the source its arguments are, but for θ.
        theta: where θ is, for all places.
        give: (m, L), where in the total its results go.
    """

    def __init__(self, function: casadi.Function, take: Indices, theta: Indices, give: Indices):
        self._program = program(function)
        self._w = registers(self._program, take.shape[1])
        n = function.numel_in(0) + function.numel_in(1)
        shared = np.broadcast_to(theta[:, None], (len(theta), take.shape[1]))
        self._take, self._give = np.concatenate([take[:n], shared, take[n:]]), np.ascontiguousarray(give)

    def __call__(self, source: Array, total: Array) -> None:
        _interpret(self._program, self._w, self._take, self._give, source, total)


@kernel
def _interpret(program: Program, w: Array, take: Indices, give: Indices, source: Array, total: Array) -> None:
    for i in range(take.shape[0]):
        for j in range(take.shape[1]):
            w[i, j] = source[take[i, j]]
    run(program, w)
    for i in range(give.shape[0]):
        row = program.outputs[i]
        for j in range(give.shape[1]):
            total[give[i, j]] += w[row, j]


class Called:
    """Any CasADi function of one result, called once per place within CasADi; arguments as of `Interpreted`."""

    def __init__(self, function: casadi.Function, take: Indices, theta: Indices, give: Indices):
        L, sizes = take.shape[1], [function.numel_in(i) for i in range(function.n_in())]
        theta_symbol = casadi.MX.sym("theta", sizes[2])
        symbols = [casadi.MX.sym(f"i{i}", n, L) for i, n in enumerate(sizes) if i != 2]
        calls = []
        for lane in range(L):
            v, q, *dual = (symbol[:, lane] for symbol in symbols)
            calls.append(function(v, q, theta_symbol, *dual))
        result = casadi.densify(casadi.horzcat(*calls))
        whole = casadi.Function("lanes", [theta_symbol, *symbols], [result])
        self._function = Buffered(whole, [(L, function.numel_out(0))])
        ends = np.cumsum([0, *(n for i, n in enumerate(sizes) if i != 2)])
        self._take = [take[a:b].T for a, b in pairwise(ends.tolist())]
        self._theta, self._give = theta, give.T

    def __call__(self, source: Array, total: Array) -> None:
        (result,) = self._function(source[self._theta], *(source[take] for take in self._take))
        np.add.at(total, self._give, result)


@dataclass(frozen=True)
class Element:
    """A function (c, ℓ) of variables v (nv,), what differs from place to place q (nq,), and θ.

    Attributes:
        value: (v, q, θ) -> (c, ℓ) in one column.
        first: (v, q, θ) -> (c, ℓ, nonzeros of ∂c/∂v, ∂ℓ/∂v).
        second: (v, q, θ, σ, λ) -> nonzeros of the Hessian of σ ℓ + λᵀc by v, or what stands for it.
        jacobian, hessian: rows and columns of those nonzeros.
        nc: the size of c.
    """

    value: casadi.Function
    first: casadi.Function
    second: casadi.Function
    jacobian: tuple[Indices, Indices]
    hessian: tuple[Indices, Indices]
    nc: int


def element(v: Any, q: Any, theta: Any, c: Any, cost: Any, *, gauss_newton: Any = None) -> Element:
    """An element of expressions in symbols v, q and θ.

    Args:
        gauss_newton: what the Hessian of ℓ is replaced by, (nv, nv); then that of c is left out.
    """
    sym = casadi.SX.sym if isinstance(v, casadi.SX) else casadi.MX.sym
    c, nv = casadi.densify(c), v.numel()
    J = casadi.jacobian(c, v)
    slope = casadi.densify(casadi.jacobian(cost, v).T)
    sigma, multipliers = sym("sigma"), sym("lambda", c.numel())
    if gauss_newton is None:
        H, _ = casadi.hessian(sigma * cost + casadi.dot(multipliers, c), v)
    else:
        H = sigma * gauss_newton
    given = [v, q, theta]
    values = casadi.vertcat(c, cost)
    return Element(
        _function("value", given, values),
        _function("first", given, casadi.vertcat(values, casadi.vec(J.nz[:]), slope)),
        _function("second", [*given, sigma, multipliers], casadi.vec(H.nz[:]) if H.nnz() else type(v)(0, 1)),
        _triplet(J, c.numel(), nv),
        _triplet(H, nv, nv),
        int(c.numel()),
    )


def _function(name: str, given: Sequence[Any], result: Any) -> casadi.Function:
    return casadi.Function(name, list(given), [casadi.cse(casadi.densify(result))])


def _triplet(matrix: Any, rows: int, columns: int) -> tuple[Indices, Indices]:
    assert matrix.shape == (rows, columns)
    i, j = matrix.sparsity().get_triplet()
    return np.array(i, dtype=np.int64), np.array(j, dtype=np.int64)


@dataclass(frozen=True)
class Part:
    """An element at L places.

    Attributes:
        variables: (nv, L), where in z its variables are; places may share some.
        rows: (nc, L), where in g its c goes, or -1: nowhere.
        lanes: from the kind of function, take, θ and give to its `Lanes`, if it has a way of its own.
    """

    element: Element
    variables: Indices
    rows: Indices
    lanes: Callable[[str, Indices, Indices, Indices], Lanes] | None = None


class Separable:
    """f, g and their derivatives of a partially separable program.

    Args:
        parts: the elements and their places.
        fixed: variables that g pins to values given in p: g[row] = z[variable] − value, as (rows, variables).
        nz, ng: sizes of z and g.
        lanes: `Interpreted`, or `Called`.

    p holds the values of `fixed`, then q (nq, L) of each part, flattened, then θ. Derivatives come as nonzeros in
    CasADi's order, of `jacobian` (ng, nz) and the symmetric `hessian` (nz, nz). What is returned is overwritten by the
    next call.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        fixed: tuple[Indices, Indices],
        *,
        nz: int,
        ng: int,
        lanes: Callable[..., Lanes],
    ):
        self.nz, self.ng, self._fixed = nz, ng, fixed
        given = [p.element.value.numel_in(1) * p.variables.shape[1] for p in parts]
        self.ntheta = int(parts[0].element.value.numel_in(2))
        self.np = len(fixed[0]) + sum(given) + self.ntheta
        # The source: z, p, multipliers of g, 0, σ.
        self._source = np.zeros(nz + self.np + ng + 2)
        self._p, self._dual = slice(nz, nz + self.np), slice(nz + self.np, nz + self.np + ng)
        theta = np.arange(self._p.stop - self.ntheta, self._p.stop)

        jacobians = [fixed[1] * ng + fixed[0]]
        hessians = [np.zeros(0, dtype=np.int64)]
        for part in parts:
            row, column = part.rows[part.element.jacobian[0]], part.variables[part.element.jacobian[1]]
            jacobians.append(np.where(row < 0, ng * nz, column * ng + row))
            row, column = (part.variables[i] for i in part.element.hessian)
            hessians.append(column * nz + row)
        self.jacobian, into_jacobian = _pattern(jacobians, ng, nz)
        self.hessian, into_hessian = _pattern(hessians, nz, nz)

        # The totals: f, g, ∇f, ∂g/∂z, and a place for what nobody asks for; and the Hessian.
        edges = np.cumsum([0, 1, ng, nz, self.jacobian.nnz()]).tolist()
        self._f, self._g, self._slope, self._jacobian = (slice(a, b) for a, b in pairwise(edges))
        nowhere = edges[-1]
        self._values, self._slopes = np.zeros(nowhere + 1), np.zeros(nowhere + 1)
        self._start = np.zeros(nowhere + 1)
        self._start[self._jacobian][into_jacobian[0]] = 1.0
        self._curvature = np.zeros(self.hessian.nnz())

        self._places: dict[str, list[tuple[casadi.Function, Indices, Indices]]] = {
            "value": [],
            "first": [],
            "second": [],
        }
        start = nz + len(fixed[0])
        for part, n, J, H in zip(parts, given, into_jacobian[1:], into_hessian[1:], strict=True):
            L = part.variables.shape[1]
            q = np.arange(start, start + n).reshape(-1, L)
            start += n
            take = np.concatenate([part.variables, q])
            value = np.concatenate([np.where(part.rows < 0, nowhere, 1 + part.rows), np.zeros((1, L), int)])
            first = np.concatenate(
                [value, np.where(J < self.jacobian.nnz(), J + edges[-2], nowhere), part.variables + edges[-3]]
            )
            multipliers = np.where(part.rows < 0, self._dual.stop, self._dual.start + part.rows)
            sigma = np.full((1, L), self._dual.stop + 1)
            self._places["value"].append((part.element.value, take, value))
            self._places["first"].append((part.element.first, take, first))
            dual = np.concatenate([take, sigma, multipliers])
            self._places["second"].append((part.element.second, dual, H))
        self._theta, self._lanes = theta, lanes
        self._own = [part.lanes for part in parts]
        self._made: dict[str, list[Lanes]] = {}
        self._at: dict[str, Array] = {}

    def give(self, p: Array) -> None:
        """Set p for the calls to come."""
        self._source[self._p] = p
        self._at.clear()

    def values(self, z: Array) -> tuple[Array, Array]:
        """f (1,) and g (ng,)."""
        self._evaluate("value", z, self._values)
        return self._values[self._f], self._values[self._g]

    def slopes(self, z: Array) -> tuple[Array, Array, Array, Array]:
        """f (1,), g (ng,), ∇f (nz,) and the nonzeros of ∂g/∂z."""
        self._evaluate("first", z, self._slopes)
        t = self._slopes
        return t[self._f], t[self._g], t[self._slope], t[self._jacobian]

    def curvature(self, z: Array, sigma: Array, multipliers: Array) -> Array:
        """Nonzeros of the Hessian of σ f + λᵀg; sigma: (1,), multipliers: (ng,)."""
        source = self._source
        source[: self.nz], source[self._dual], source[-1] = z, multipliers, sigma[0]
        self._curvature[:] = 0.0
        for evaluate in self._evaluators("second"):
            evaluate(source, self._curvature)
        return self._curvature

    def expressions(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same as CasADi expressions: f, g, grad_f_x, jac_g_x, hess_gamma_x_x of symbols x, p, lam_f, lam_g."""
        sizes = {"x": self.nz, "p": self.np, "lam_f": 1, "lam_g": self.ng}
        symbols = {name: casadi.MX.sym(name, n) for name, n in sizes.items()}
        primal = casadi.vertcat(symbols["x"], symbols["p"])
        whole = casadi.vertcat(primal, symbols["lam_g"], 0, symbols["lam_f"])
        theta = primal[self._theta.tolist()]

        def total(kind: str, wanted: slice) -> Any:
            columns, into = [casadi.MX(0, 1)], [np.empty(0, dtype=np.int64)]
            source = whole if kind == "second" else primal
            for function, take, give in self._places[kind]:
                inside = (give >= wanted.start) & (give < wanted.stop)
                rows = np.flatnonzero(inside.any(1))
                if not len(rows):
                    continue
                picked = _picked(function, rows)
                v, q = picked.numel_in(0), picked.numel_in(0) + picked.numel_in(1)
                for lane in range(take.shape[1]):
                    given = source[take[:, lane].tolist()]
                    dual = [given[q], given[q + 1 :]] if kind == "second" else []
                    columns.append(picked(given[:v], given[v:q], theta, *dual))
                    into.append(np.where(inside[rows, lane], give[rows, lane] - wanted.start, -1))
            return _gathered(np.concatenate(into), wanted.stop - wanted.start) @ casadi.vertcat(*columns)

        rows, variables = self._fixed
        pinned = symbols["x"][variables.tolist()] - symbols["p"][: len(rows)]
        jacobian = total("first", self._jacobian) + casadi.DM(self._start[self._jacobian])
        return symbols, {
            "f": total("value", self._f),
            "g": total("value", self._g) + _gathered(rows, self.ng) @ pinned,
            "grad_f_x": total("first", self._slope),
            "jac_g_x": casadi.MX(self.jacobian, jacobian),
            "hess_gamma_x_x": casadi.MX(self.hessian, total("second", slice(0, self.hessian.nnz()))),
        }

    def _evaluators(self, kind: str) -> list[Lanes]:
        """Made when they are first needed."""
        if kind not in self._made:
            self._made[kind] = [
                self._lanes(function, take, self._theta, give)
                if own is None
                else own(kind, take, self._theta, give)
                for own, (function, take, give) in zip(self._own, self._places[kind], strict=True)
            ]
        return self._made[kind]

    def _evaluate(self, kind: str, z: Array, total: Array) -> None:
        """Solvers ask for f and g, or ∇f and ∂g/∂z, one after the other: nothing to do the second time."""
        before = self._at.get(kind)
        if before is not None and np.array_equal(before, z):
            return
        self._at[kind] = z.copy()
        source = self._source
        source[: self.nz] = z
        total[:] = self._start
        for evaluate in self._evaluators(kind):
            evaluate(source, total)
        rows, variables = self._fixed
        total[self._g][rows] = z[variables] - source[self.nz : self.nz + len(rows)]


def _pattern(keys: Sequence[Indices], rows: int, columns: int) -> tuple[casadi.Sparsity, list[Indices]]:
    """The sparsity of entries column · rows + row, and which nonzero each is; the last and one more: none."""
    kept, into = np.unique(np.concatenate([k.ravel() for k in keys]), return_inverse=True)
    inside = kept[kept < rows * columns]
    sparsity = casadi.Sparsity.triplet(rows, columns, (inside % rows).tolist(), (inside // rows).tolist())
    ends = np.cumsum([k.size for k in keys])[:-1]
    pieces = np.split(into, ends)
    return sparsity, [piece.reshape(k.shape) for piece, k in zip(pieces, keys, strict=True)]


def _picked(function: casadi.Function, rows: Indices) -> casadi.Function:
    """Some rows of a function's result, without what only the others need, as far as CasADi can tell."""
    sym = casadi.SX.sym if function.is_a("SXFunction") else casadi.MX.sym
    given = [sym(f"i{i}", function.numel_in(i)) for i in range(function.n_in())]
    return casadi.Function("picked", given, [function(*given)[rows.tolist()]])


def _gathered(rows: Indices, n: int) -> casadi.DM:
    """The matrix (n, m) that adds the j-th of m numbers to the row rows[j], or nowhere: -1."""
    kept = np.flatnonzero(rows >= 0)
    return casadi.DM.triplet(rows[kept].tolist(), kept.tolist(), casadi.DM.ones(len(kept)), n, len(rows))
