"""CasADi's solvers on a partially separable program."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import casadi
import numpy as np
import numpy.typing as npt

from mbrl.errors import MbrlError, UnsupportedProblem
from mbrl.planners.buffered import Array, Buffered
from mbrl.planners.generated import generated
from mbrl.planners.nlp import Bounds, OptimalControl
from mbrl.planners.separable import Separable

SolverName = Literal["fatrop", "ipopt", "sqp"]
QP = Literal["qrqp", "osqp", "piqp"]


@dataclass(frozen=True)
class Solution:
    """Where a solver ended.

    Attributes:
        z: (nz,). bound_multipliers: (nz,). multipliers: (ng,).
        f, g: objective and constraints (ng,) at z.
        iterations: how many were made.
        message: the solver's own status.
        converged: whether it says that z is optimal.
        late: whether it was stopped at the deadline.
    """

    z: Array
    bound_multipliers: Array
    multipliers: Array
    f: float
    g: Array
    iterations: int
    message: str
    converged: bool
    late: bool

    @property
    def finite(self) -> bool:
        parts = (self.z, self.bound_multipliers, self.multipliers, self.g)
        return all(bool(np.isfinite(part).all()) for part in parts)

    def gap(self, bounds: Bounds) -> float:
        """The largest violation of an equation."""
        _, _, lower, upper = bounds
        equations = lower == upper
        return float(np.abs(self.g[equations] - lower[equations]).max())


class Solver:
    """A solver built for one program; numbers come with each call.

    Args:
        iterations: at most.
        tolerance: of the optimality conditions.
        qp: what solves the quadratic programs of "sqp".
        deadline: whether calls may have a budget.
        code: whether to compile the program's functions.

    Raises:
        MbrlError: this CasADi has no such solver.
    """

    def __init__(
        self,
        control: OptimalControl,
        name: SolverName,
        *,
        iterations: int,
        tolerance: float,
        qp: QP,
        deadline: bool,
        code: bool,
    ):
        self._program = program = control.program
        self._clock = _Clock(program.nz, program.ng, program.np) if deadline else None
        cache = _functions(name, program, code=code)
        common = {
            "print_time": False,
            "error_on_fail": False,
            "calc_lam_p": False,
            "show_eval_warnings": False,
            "cache": {n: f for n, f in cache.items() if n not in ("nlp", "values")},
        }
        if self._clock is not None:
            common["iteration_callback"] = self._clock
        sizes = ((program.nz,), None, None, (program.nz,), (program.ng,), None)
        self._runs: list[tuple[casadi.Function, Buffered]] = []  # for a cold start, and for a warm one
        for warm in (False,) if name == "sqp" else (False, True):
            options = {**common, **_options(name, control, iterations, tolerance, qp, warm=warm)}
            try:
                solver = casadi.nlpsol("solver", _PLUGINS[name], cache["nlp"], options)
            except RuntimeError as error:
                if "plugin" not in str(error).lower():
                    raise
                raise MbrlError(
                    f"CasADi {casadi.__version__} here cannot load the solver {name!r}"
                    f"{f' with {qp!r}' if name == 'sqp' else ''}: {str(error).splitlines()[-1]} Choose another one."
                ) from error
            self._runs.append((solver, Buffered(solver, sizes)))
        self._name, self._iterations = name, iterations
        self._kept = cache  # CasADi does not hold Python functions
        self._compiled = Buffered(cache["values"], ((1,), (program.ng,))) if code else None

    def _values(self, z: Array, p: Array) -> tuple[Array, Array]:
        """f (1,) and g (ng,)."""
        if self._compiled is None:
            return self._program.values(z)
        f, g = self._compiled(z, p)
        return f, g

    def __call__(
        self,
        z: Array,
        bound_multipliers: Array,
        multipliers: Array,
        p: Array,
        bounds: Bounds,
        *,
        budget_ms: float | None = None,
    ) -> Solution:
        """Solve from a guess; bounds: of z and of g, each lower and upper."""
        self._program.give(p)
        if self._clock is not None:
            self._clock.start(budget_ms)
        warm = bool(bound_multipliers.any() or multipliers.any())
        f, g = self._values(z, p)
        if not all(np.isfinite(part).all() for part in (f, g, bound_multipliers, multipliers)):
            words, unknown = (
                f"{self._name}: the guess leads out of the finite numbers",
                np.full_like(g, np.nan),
            )
            return Solution(z, bound_multipliers, multipliers, float(f[0]), unknown, 0, words, False, False)
        given = (z, p, *bounds, bound_multipliers, multipliers)
        found = self._run(self._runs[-1 if warm else 0], given)
        if warm and not found.converged and not found.late and len(self._runs) > 1:
            again = self._run(self._runs[0], given)  # the last optimum was no help
            found = dataclasses.replace(again, iterations=found.iterations + again.iterations)
        return found

    def _run(self, run: tuple[casadi.Function, Buffered], given: tuple[Array, ...]) -> Solution:
        solver, call = run
        results = call(*given)
        stats = solver.stats(1)  # of the buffer's memory
        z, bound_multipliers, multipliers = (results[i].copy() for i in (0, 3, 4))
        f, g = self._values(z, given[1])
        return Solution(
            z=z,
            bound_multipliers=bound_multipliers,
            multipliers=multipliers,
            f=float(f[0]),
            g=g.copy(),
            iterations=int(stats["iter_count"]),
            message=f"{self._name}: {_words(stats, self._iterations)}",
            converged=bool(stats["success"]),
            late=self._clock is not None and self._clock.rang,
        )


def _words(stats: dict[str, Any], iterations: int) -> str:
    """The solver's status; fatrop's own is a number."""
    if not stats["success"] and stats["iter_count"] >= iterations:
        return "the iterations ran out"
    own, common = stats["return_status"], str(stats["unified_return_status"])
    words = own if isinstance(own, str) else common.removeprefix("SOLVER_RET_")
    return "no solution found" if words == "UNKNOWN" else words.replace("_", " ").lower()


_HUGE = 1e20
"""What stands for a value that is not finite: where it was tried, a step must look too long. For a derivative 0 does.
Of NaN, fatrop's loops for step lengths and regularisation never end."""
_WARM = 1e-6
"""The barrier parameter that interior-point methods begin with next to an optimum; of 0.1 … 1e-6 the fastest in the closed
loops of `nmpc_speed`. Where it does not lead to an optimum, a solve with the default one follows."""
_PLUGINS = {"fatrop": "fatrop", "ipopt": "ipopt", "sqp": "sqpmethod"}


def _options(
    name: SolverName, control: OptimalControl, iterations: int, tolerance: float, qp: QP, *, warm: bool
) -> dict[str, Any]:
    barrier = {"mu_init": _WARM} if warm else {}
    if name == "fatrop":
        _, _, least, most = control.bounds(np.zeros(1), np.zeros(1), None)
        _check_stages(control, least == most)
        return {
            "structure_detection": "manual",
            **control.structure(),
            "equality": (least == most).tolist(),
            "fatrop": {"print_level": 0, "max_iter": iterations, "tolerance": tolerance, **barrier},
        }
    if name == "ipopt":
        return {
            "ipopt": {
                "print_level": 0,
                "sb": "yes",
                "max_iter": iterations,
                "tol": tolerance,
                "warm_start_init_point": "yes" if warm else "no",
                **barrier,
            }
        }
    quiet: dict[str, dict[str, Any]] = {
        "qrqp": {"print_iter": False, "print_header": False, "print_info": False},
        "osqp": {"osqp": {"verbose": False, "eps_abs": tolerance, "eps_rel": tolerance}},
        "piqp": {"piqp": {"verbose": False}},
    }
    return {
        "qpsol": qp,
        "qpsol_options": {"error_on_fail": False, **quiet[qp]},
        "max_iter": iterations,
        "tol_pr": tolerance,
        "tol_du": tolerance,
        "print_header": False,
        "print_iteration": False,
        "print_status": False,
        "convexify_strategy": "regularize",
    }


def _check_stages(control: OptimalControl, equation: npt.NDArray[np.bool_]) -> None:
    """fatrop ends the process's plan with an assertion where a stage has more equations than variables."""
    shape = control.structure()
    for k, (rows, nx, nu) in enumerate(zip(control.rows, shape["nx"], shape["nu"], strict=True)):
        own = rows[rows >= 0][nx if k < control.horizon else 0 :]
        asked = int(equation[own].sum())
        if asked > nx + nu:
            where = f"step {k}" if k < control.horizon else "the end"
            raise UnsupportedProblem(
                f"The solver fatrop needs no more equations than variables at a time, but at {where} there are {asked} "
                f'(the initial state among them) on {nx} states and {nu} controls and slacks. Use solver="ipopt", or a '
                "soft constraint."
            )


_ASKED = {
    "fatrop": {
        "nlp_f": ("f",),
        "nlp_g": ("g",),
        "nlp_grad_f": ("grad_f_x",),
        "nlp_jac_g": ("g", "jac_g_x"),
        "nlp_hess_l": ("grad_gamma_x", "hess_gamma_x_x"),
    },
    "ipopt": {
        "nlp_f": ("f",),
        "nlp_g": ("g",),
        "nlp_grad_f": ("f", "grad_f_x"),
        "nlp_jac_g": ("g", "jac_g_x"),
        "nlp_hess_l": ("triu_hess_gamma_x_x",),
    },
    "sqp": {
        "nlp_fg": ("f", "g"),
        "nlp_jac_fg": ("f", "grad_f_x", "g", "jac_g_x"),
        "nlp_hess_l": ("hess_gamma_x_x",),
    },
}
"""The functions that a solver asks CasADi for, by its names, and their results. Given none, it would differentiate."""


def _functions(name: SolverName, program: Separable, *, code: bool) -> dict[str, casadi.Function]:
    """Those of `_ASKED` and "nlp" itself, evaluated by the program, or as C code."""
    asked = {"nlp": ("f", "g"), **_ASKED[name]}
    made = (
        _generated(program, asked)
        if code
        else {n: _oracle(n, program, results) for n, results in asked.items()}
    )
    column = casadi.MX.sym
    dual = [column("x", program.nz), column("p", program.np), column("lam_f"), column("lam_g", program.ng)]
    nothing = [casadi.MX(n, 1) for n in (1, program.ng, program.nz, program.np)]
    outs = ["f", "g", "grad_gamma_x", "grad_gamma_p"]
    # Of p, and never called; CasADi would derive it from the others when the solver is made.
    made["nlp_grad"] = casadi.Function("nlp_grad", dual, nothing, ["x", "p", "lam_f", "lam_g"], outs)
    return made


def _finite(values: Array, *, derivative: bool) -> Array:
    if np.isfinite(values).all():
        return values
    return np.where(np.abs(values) <= _HUGE, values, 0.0 if derivative else _HUGE)


def _finite_expression(values: Any, *, derivative: bool) -> Any:
    """As `_finite`."""
    known = values.nz[:]
    known = casadi.if_else(casadi.fabs(known) <= _HUGE, known, 0.0 if derivative else _HUGE)
    return casadi.MX(values.sparsity(), casadi.vec(known))


def _generated(program: Separable, asked: dict[str, tuple[str, ...]]) -> dict[str, casadi.Function]:
    symbols, plain = program.expressions()
    found = {name: _finite_expression(e, derivative=name not in ("f", "g")) for name, e in plain.items()}
    found["grad_gamma_x"] = casadi.MX(program.nz, 1)
    found["triu_hess_gamma_x_x"] = casadi.triu(found["hess_gamma_x_x"])
    made = []
    for name, results in asked.items():
        given = [n for n in symbols if name == "nlp_hess_l" or n in ("x", "p")]
        wanted = [found[result] for result in results]
        made.append(casadi.Function(name, [symbols[n] for n in given], wanted, given, list(results)))
    made.append(casadi.Function("values", [symbols["x"], symbols["p"]], [plain["f"], plain["g"]]))
    return {function.name(): function for function in generated(made)}


def _oracle(name: str, program: Separable, results: tuple[str, ...]) -> casadi.Function:
    column, H = casadi.Sparsity.dense, program.hessian
    sizes = {"x": program.nz, "p": program.np}
    if name == "nlp_hess_l":
        sizes |= {"lam_f": 1, "lam_g": program.ng}
    patterns = {
        "f": column(1, 1),
        "g": column(program.ng, 1),
        "grad_f_x": column(program.nz, 1),
        "jac_g_x": program.jacobian,
        "grad_gamma_x": casadi.Sparsity(program.nz, 1),
        "hess_gamma_x_x": H,
        "triu_hess_gamma_x_x": casadi.triu(H),
    }
    # p is known to the program: it was set when the solver was called.
    if name == "nlp_hess_l":
        rows, columns = (np.array(i) for i in H.get_triplet())
        part = np.flatnonzero(rows <= columns) if results[-1].startswith("triu") else slice(None)
        nothing = [None] * (len(results) - 1)

        def evaluate(z: Array, p: Array, sigma: Array, multipliers: Array) -> Sequence[Array | None]:
            found = program.curvature(z, sigma, multipliers)[part]
            return [*nothing, _finite(found, derivative=True)]

    else:
        places = [("f", "g", "grad_f_x", "jac_g_x").index(result) for result in results]
        of = program.slopes if max(places) > 1 else program.values

        def evaluate(z: Array, p: Array) -> Sequence[Array | None]:  # type: ignore[misc]
            found = of(z)
            return [_finite(found[place], derivative=place > 1) for place in places]

    given = {n: column(m, 1) for n, m in sizes.items()}
    return _Oracle(name, given, {result: patterns[result] for result in results}, evaluate)


class _Oracle(casadi.Callback):  # type: ignore[misc]
    """A function of arrays as a CasADi function: its sparsities in and out, and how it is evaluated."""

    def __init__(self, name: str, given: dict[str, Any], made: dict[str, Any], evaluate: Any):
        casadi.Callback.__init__(self)
        self._given, self._made, self._evaluate = given, made, evaluate
        self.construct(name, {})

    def get_n_in(self) -> int:
        return len(self._given)

    def get_n_out(self) -> int:
        return len(self._made)

    def get_name_in(self, i: int) -> str:
        return list(self._given)[i]

    def get_name_out(self, i: int) -> str:
        return list(self._made)[i]

    def get_sparsity_in(self, i: int) -> Any:
        return list(self._given.values())[i]

    def get_sparsity_out(self, i: int) -> Any:
        return list(self._made.values())[i]

    def has_eval_buffer(self) -> bool:
        return True

    def eval_buffer(self, arguments: Any, results: Any) -> int:
        made = self._evaluate(*(np.frombuffer(a) for a in arguments))
        for memory, result in zip(results, made, strict=True):
            if memory is not None and result is not None:
                np.frombuffer(memory)[:] = result
        return 0


class _Clock(casadi.Callback):  # type: ignore[misc]
    """Stops a solver after the iteration in which its time runs out."""

    def __init__(self, nz: int, ng: int, n: int):
        casadi.Callback.__init__(self)
        self._sizes = {"x": nz, "f": 1, "g": ng, "lam_x": nz, "lam_g": ng, "lam_p": n}
        self._ends, self.rang = np.inf, False
        self.construct("clock", {})

    def start(self, budget_ms: float | None) -> None:
        self._ends = np.inf if budget_ms is None else time.perf_counter() + 1e-3 * budget_ms
        self.rang = False

    def get_n_in(self) -> int:
        return len(self._sizes)

    def get_n_out(self) -> int:
        return 1

    def get_sparsity_in(self, i: int) -> Any:
        return casadi.Sparsity.dense(list(self._sizes.values())[i], 1)

    def has_eval_buffer(self) -> bool:
        return True

    def eval_buffer(self, arguments: Any, results: Any) -> int:
        self.rang = time.perf_counter() >= self._ends
        np.frombuffer(results[0])[:] = float(self.rang)
        return 0
